"""Kinds of caches: what each keeps, how a new pair enters, how a query reads it, what it learns from each step."""
