"""How the parts are put together, run and watched."""
