"""Generated from protocols/proto; do not edit."""
