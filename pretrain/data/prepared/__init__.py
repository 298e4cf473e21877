"""Prepared data: tokens that were made once and are read as they are, from memory-mapped shards.

`layout` is the format of a prepared folder, `speedrun` that of the speedrun's `.bin` shards, `runs` what a lane reads
from either, and `catalog` how both look to the rest of this room. `plan`, `parts`, `duplicates`, `assembly` and
`prepare` write a folder, in this order.
"""
