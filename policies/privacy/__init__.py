"""What privacy a release costs, and whether it can be afforded.

    sensitivity   how far one unit can move a sum of integers; noise made for exactly that
    accounting    events anyone can compose again, and the epsilon they come to
    budget        may this release be afforded?

Pure. ``dp_accounting`` is imported when something is accounted, not before. No plan mode uses this
package yet.
"""
