"""The decision core and the actors around it: no HTTP, no SQL."""
