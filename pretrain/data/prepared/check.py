"""Check prepared data before a run: its checksums, and whether its tokenizer is that of the run."""

from pathlib import Path

import numpy as np

from pretrain.data.errors import DataError
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.layout import DOCUMENTS_SUFFIX, TokenizerNeeds, load_index, map_table
from pretrain.data.split import Hashes
from pretrain.files import file_sha256


def check_shard(path: str, in_full: bool) -> Hashes | None:
    """Check a shard; return the hashes of its documents, or None if it records none.

    Args:
        path: its file of tokens.
        in_full: whether to compare the checksums, which reads the whole shard.

    Raises:
        DataError: the shard is damaged.

    """
    if path.endswith(speedrun.SUFFIX):
        return None
    tokens = Path(path)
    documents = tokens.with_suffix(DOCUMENTS_SUFFIX)
    shard = next(shard for shard in load_index(str(tokens.parent)).shards if shard.name == tokens.stem)
    if in_full:
        for file, expected in ((tokens, shard.tokens_sha256), (documents, shard.documents_sha256)):
            if (found := file_sha256(file)) != expected:
                raise DataError(f"{file}: has the sha256 {found}, but the index says {expected}: the file is damaged")
    table = map_table(documents, shard.documents)
    if shard.documents and (int(table.ends[-1]) != shard.tokens or int(table.text_bytes[-1]) != shard.text_bytes):
        raise DataError(f"{documents}: does not add up to the tokens and bytes that the index states")
    return np.asarray(table.hashes)


def tokenizer_problem(source: str, needs: TokenizerNeeds, name: str, sha256: str, eos_id: int, rows: int) -> str | None:
    """Return why a source cannot be read with the tokenizer of a run; None if it can.

    Args:
        source: path of the source, for the message.
        needs: the tokenizer that its tokens were made with.
        name: the run's tokenizer, for the message.
        sha256: its digest.
        eos_id: its separator.
        rows: the rows of its vocabulary.

    """
    if needs.sha256 is not None and needs.sha256 != sha256:
        return (
            f"{source}: was prepared with another tokenizer (sha256 {needs.sha256}) than tokenizer.path {name} "
            f"(sha256 {sha256}): use the tokenizer.json in that folder, or prepare the data again"
        )
    if needs.eos_id != eos_id:
        return (
            f"{source}: its documents are separated by the token {needs.eos_id}, but tokenizer.eos_token is token "
            f"{eos_id} of {name}: set eos_token to the one that the data was prepared with"
        )
    if needs.rows is not None and needs.rows != rows:
        return (
            f"{source}: holds tokens of GPT-2's vocabulary of {needs.rows} entries, but tokenizer.path {name} has "
            f"{rows}: use GPT-2's tokenizer.json"
        )
    return None
