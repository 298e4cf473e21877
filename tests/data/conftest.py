from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pretrain.config.data import TokenizerConfig
from tests.data.corpus import EOS, make_texts
from tests.data.store import Store, fill
from tests.warm import warm_workers


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """A byte-level BPE of 300 entries."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text.replace(EOS, "") for text in make_texts(0, 50)], trainer)
    path: Path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    bpe.save(str(path))
    return TokenizerConfig(path=str(path))


@pytest.fixture
def warm() -> Iterator[None]:
    """Worker processes start in a moment."""
    with warm_workers():
        yield


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Two remote sources without a network: see `tests.data.store.fill`."""
    fill(tmp_path / "hub")
    return Store(tmp_path / "hub", monkeypatch)
