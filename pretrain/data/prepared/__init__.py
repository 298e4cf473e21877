"""Prepared data: text that was tokenized once, and is read from memory-mapped shards.

Formats: `layout` describes a prepared folder, `speedrun` the `.bin` shards of the speedruns.
Reading: `reading` lists the files of a source and reads their units, `runs` is what a lane gets; `remote` describes
folders on servers, `check` compares checksums and tokenizers.
Writing: `plan`, `parts`, `duplicates`, `assembly` and `prepare`, in the order of the work.
"""
