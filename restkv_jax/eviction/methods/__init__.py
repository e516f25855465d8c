"""Published methods and ours, a short file each: a preset that returns an `EvictionPolicy`, and what only it needs."""
