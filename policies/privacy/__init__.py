"""What privacy a release costs, and whether it can be afforded.

    sensitivity   how far one unit can move a sum of integers; noise made for exactly that
    accounting    events anyone can compose again, and the epsilon they come to
    budget        may this release be afforded?
    terms         grid, noise, clamp limit and cost of a plan's rounds
    claim         what one update costs, as a value for the log, and the sum of many

Pure. ``dp_accounting`` is imported when something is accounted, not before.
"""
