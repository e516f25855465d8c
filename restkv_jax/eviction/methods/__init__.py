"""Published methods, one short file each: a preset that returns an `EvictionPolicy`, and what only it needs."""
