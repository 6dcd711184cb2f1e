"""Side-by-side runs against the peers. Slow; never part of the tests."""
