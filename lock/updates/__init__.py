"""Updates: what upstream has that is newer, and one change to all pins and locks."""
