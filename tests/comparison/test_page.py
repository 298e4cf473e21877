"""The comparison page: measured and published figures apart, what was not run is no number, and nothing unescaped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from eval.compare_tables import markdown_text
from pretrain.cli import main
from pretrain.comparison.facts import Facts
from pretrain.comparison.measured import Measured
from pretrain.comparison.write import write_comparison
from tests.comparison.files import MODELS, facts, outcomes, write_files, write_result
from tests.eval.results import a_group, a_result, write
from tests.report.test_page import NASTY, Page

CONFIG = Path(__file__).parents[2] / "configs/eval/paper.yaml"


class Tables(HTMLParser):
    """The tables of a page by caption: rows of cells by heading, with the small print and the sources in brackets."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[dict[str, str]]] = {}
        self._caption, self._heads, self._cell, self._row = "", [""], "", [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._caption, self._heads = "", []
        if tag == "tr":
            self._row = []
        if tag in ("caption", "th", "td"):
            self._cell = ""
        if (tag, dict(attrs).get("class")) in (("span", "range"), ("a", "cite")):
            self._cell += " "

    def handle_data(self, data: str) -> None:
        self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self._caption = self._cell
        if tag in ("th", "td"):
            self._row.append(self._cell)
        if tag == "thead":
            self._heads = self._row
        if tag == "tr" and self._row is not self._heads and self._heads:
            self.found.setdefault(self._caption, []).append(dict(zip(self._heads, self._row, strict=True)))


def make(config: Path, *arguments: str, out: Path | None = None) -> tuple[str, str]:
    """Run the command; the HTML and the Markdown."""
    folder = out or config.parent / "page"
    assert main(["compare-page", str(config), *arguments, "--out", str(folder)]) == 0
    return (folder / "comparison.html").read_text(), (folder / "comparison.md").read_text()


def rows(html: str, caption: str) -> Mapping[str, dict[str, str]]:
    """The rows of a table by their first cell's first word."""
    return {next(iter(row.values())).split(" ")[0]: row for row in Tables(html).found[caption]}


def test_without_results_every_model_is_not_run_and_has_no_measured_number(tmp_path: Path) -> None:
    html, text = make(write_files(tmp_path, facts()))
    for row in rows(html, "hellaswag").values():
        assert (row["Measured [95 %]"], row["Setting"]) == ("not run", "–")
    assert rows(html, "hellaswag")["ours"]["Published"].startswith("0.676")
    assert rows(html, "hellaswag")["third"]["Published"] == "–"
    for row in rows(html, "As loaded for the evaluation").values():
        assert row["Weights"] == "not run"
        assert not re.search(r"\d", "".join(list(row.values())[1:]))
    assert "0 of 3 models run" in html
    assert "0 of 3 models run" in text
    assert text.count("| not run |") == 7
    efficiency = Tables(html).found["As good with less"]
    assert [row["At equal score?"] for row in efficiency][:2] == ["claimed", "not run"]


def test_measured_and_published_scores_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    ours, theirs = outcomes(400, 0.7, seed=1), outcomes(400, 0.4, seed=2)
    write_result(tmp_path / "out", "ours", {"hellaswag": ours}, "runs/ours")
    write_result(tmp_path / "out", "theirs", {"hellaswag": theirs, "winogrande": theirs}, "org/theirs")
    html, text = make(config, str(tmp_path / "out"))
    found = rows(html, "hellaswag")
    for label, values in (("ours", ours), ("theirs", theirs)):
        score, low, high = map(float, re.findall(r"0\.\d+", found[label]["Measured [95 %]"]))
        assert score == pytest.approx(sum(values) / 400, abs=1e-4)
        assert low == pytest.approx(score - 0.047, abs=0.01)
        assert high == pytest.approx(score + 0.047, abs=0.01)
        assert "acc_norm, 0 shots 400 items, validation" in found[label]["Setting"]
    assert found["ours"]["Published"].split() == ["0.676", "[1]"]
    assert found["ours"]["Published setting"] == "metric unknown, 0 shots, x"
    assert found["third"]["Measured [95 %]"] == "not run"
    assert rows(html, "winogrande")["ours"]["Measured [95 %]"] == "not run"
    assert rows(html, "winogrande")["theirs"]["Published"] == "–"
    pair = rows(html, "theirs against ours")["hellaswag"]
    assert pair["verdict"] == "ours is better"
    assert pair["baseline"] == f"{sum(ours) / 400:.4f}"
    claim = [row for row in Tables(html).found["As good with less"] if row["Task"] == "hellaswag"]
    assert claim[0]["At equal score?"] == "ours is better measured by us"
    assert claim[0]["Tokens, ratio"].startswith("360x")
    assert "ours is better" in text
    assert "2 of 3 models run" in text
    assert "not training seeds" in text


def test_what_the_claim_implies_under_each_definition(tmp_path: Path) -> None:
    html, _ = make(write_files(tmp_path, facts()))
    efficiency = {row["Definition"]: row for row in Tables(html).found["As good with less"]}
    assert efficiency["as claimed"]["Tokens, ratio"].startswith("100x")
    assert efficiency["tokens of the reference"]["Tokens, ratio"].startswith("360x")
    assert efficiency["shortest public AdamW run"]["Tokens, ratio"].startswith("at most 3.0x")
    assert efficiency["shortest public AdamW run"]["Compared with"] == "ref 1B on good text 300B tokens"
    assert efficiency["shortest public AdamW run"]["Training FLOPs, ratio"].startswith("at most 3.0x")
    # 0.6 (D / 1e11)^-0.1 = 0.324
    assert efficiency["power law through AdamW scores"]["Tokens, ratio"].startswith("474x [474x to 474x]")
    assert "the text alone moves hellaswag by 5.8 points" in html
    assert "3.0 points apart" in html
    assert "2 of these 3 AdamW runs score at least as high as theirs" in html


def test_flops_are_counted_as_the_page_says(tmp_path: Path) -> None:
    html, _ = make(write_files(tmp_path, facts()))
    found = rows(html, "As published")
    blocks = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 256)
    flops = 36e12 * (6 * (blocks + 64_000) + 6 * 2 * 64 * 128)
    assert found["theirs"]["Training FLOPs"].startswith(f"{flops:.2e}".replace("e+", "e"))
    assert "6ND with attention" in found["theirs"]["Training FLOPs"]
    assert found["ours"]["Training FLOPs"].startswith("6.00e20")
    assert "lower bound" in found["ours"]["Training FLOPs"]
    assert found["third"]["Training FLOPs"] == "–"
    shorter, _ = make(write_files(tmp_path, facts(models__theirs__shape__training_sequence=...)))
    assert "6ND without attention" in rows(shorter, "As published")["theirs"]["Training FLOPs"]


def test_every_published_figure_shows_its_source(tmp_path: Path) -> None:
    for html, _ in (make(write_files(tmp_path, facts())), make(CONFIG, out=tmp_path / "paper")):
        numbers = {int(number) for number in re.findall(r'id="source-(\d+)"', html)}
        assert numbers == set(range(1, len(numbers) + 1))
        assert {int(number) for number in re.findall(r'href="#source-(\d+)"', html)} == numbers
        published = [
            cell
            for table in Tables(html).found.values()
            for row in table
            for head, cell in row.items()
            if head.endswith("ublished") or head in ("Tokens", "Parameters", "Without embeddings")
        ]
        assert len(published) > 8
        assert all(cell == "–" or re.search(r"\[\d+\]", cell) for cell in published)


def test_results_that_cannot_be_compared_are_shown_with_the_reason(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    write_result(tmp_path, "ours", {"hellaswag": [0, 1] * 20}, "runs/ours")
    write_result(tmp_path, "theirs", {"hellaswag": [0, 1] * 30}, "org/theirs")
    write_result(tmp_path, "third", {"hellaswag": [1, 1] * 20}, "org/third")
    html, text = make(config, str(tmp_path))
    assert rows(html, "hellaswag")["theirs"]["Measured [95 %]"].startswith("0.5000")
    assert "not compared: hellaswag: ours and theirs are not of the same items" in html
    assert "not compared: hellaswag: ours and theirs are not of the same items" in text
    captions = Tables(html).found
    assert "third against ours" in captions
    assert "theirs against ours" not in captions
    claim = [row["At equal score?"] for row in captions["As good with less"]]
    assert claim[1] == "cannot be compared"
    assert html.count("are not of the same items") == 2  # once for each direction, as baseline and as reference


def test_a_result_of_another_model_is_marked(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    write_result(tmp_path, "theirs", {"hellaswag": [0, 1]}, "org/another")
    write_result(tmp_path, "third", {"hellaswag": [0, 1]}, "org/third")
    html, text = make(config, str(tmp_path))
    for page in (html, text.replace("\\", "")):
        assert "theirs: the result is of org/another, while the config says org/theirs" in page
        assert "third: the result is of" not in page


def test_what_the_weights_carry_is_shown_apart_from_what_is_published(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    more = {
        "parameters": 1_234_000_000,
        "parameters_without_embeddings": 1_000_000_000,
        "revision": "abc123",
        "bos": "<s>",
        "provenance": {"run_name": "r", "step": 10, "tokens": 5_000_000},
    }
    write_result(tmp_path, "theirs", {"hellaswag": [0, 1]}, "org/theirs", model=more)
    html, _ = make(config, str(tmp_path))
    loaded = rows(html, "As loaded for the evaluation")["theirs"]
    assert loaded["Weights"] == "org/theirs @ abc123"
    assert loaded["Dtype"] == "float32 BOS: <s>"
    assert (loaded["Parameters"], loaded["Without embeddings"], loaded["Tokens"]) == ("1.23B", "1B", "5M")
    published = rows(html, "As published")["theirs"]
    assert "1.23B" not in published["Parameters"]
    assert published["Tokens"].startswith("36T")
    # FLOPs of what was measured are those of the tokens that it has seen.
    planned, seen = (float(row["Training FLOPs"].split()[0]) for row in (published, rows(html, "hellaswag")["theirs"]))
    assert planned / seen == pytest.approx(36e12 / 5e6, rel=0.01)


def test_bits_per_byte_are_a_table_of_their_own(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    bits: dict[str, Any] = {
        **{"bits_per_byte": 0.8125, "stderr": None, "bytes": 16, "tokens": 5, "documents": 1, "documents_in_text": 1},
        **{"context": 128, "stride": 64, "first_token": "<s>", "documents_changed_by_tokenizer": 0, "sha256": "0"},
        **{"origin": "file", "per_document": [{"doc_hash": "0", "bytes": 16, "tokens": 5, "bits": 13.0}]},
    }
    write_result(tmp_path, "theirs", {"hellaswag": [0, 1]}, "org/theirs", bits_per_byte={"prose": bits})
    write_result(tmp_path, "third", {"hellaswag": [0, 1]}, "org/third")
    html, markdown = make(config, str(tmp_path))
    found = {row["Model"]: row["prose"] for row in Tables(html).found[""]}
    assert found == {"ours": "not run", "theirs": "0.8125", "third": "not run"}
    assert "| theirs | 0.8125 |" in markdown
    assert "Bits per byte" not in make(config)[0]


def test_items_that_differ_from_the_published_ones_are_marked(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    result = a_result({"hellaswag": [0, 1]})
    result["tasks"]["hellaswag"] |= {"note": "validation split", "num_fewshot": 10}
    write(tmp_path / "third", result)
    cell = rows(make(config, str(tmp_path))[0], "hellaswag")["third"]["Setting"]
    assert cell == "acc_norm, 10 shots 2 items, validation; validation split"


def test_the_parts_of_a_group_appear_as_one_task(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    for label, model in (("ours", "runs/ours"), ("theirs", "org/theirs")):
        values = {"hellaswag": [0, 1] * 10, "mmlu_a": [1, 1, 1, 0], "mmlu_b": [0, 0]}
        group = a_group(a_result(values), ["mmlu_a", "mmlu_b"])
        write_result(tmp_path, label, values, model, groups={"mmlu": group})
    html, _ = make(config, str(tmp_path))
    found = Tables(html).found
    assert {"hellaswag", "mmlu"} <= set(found)
    assert not {"mmlu_a", "mmlu_b"} & set(found)
    assert rows(html, "mmlu")["ours"]["Measured [95 %]"].startswith("0.5000 [")
    assert "6 items" in rows(html, "mmlu")["ours"]["Setting"]
    assert "not compared" not in html
    assert "mmlu: over the items of all its tasks" in html
    assert "mmlu_a" not in html


def test_items_of_one_source_widen_the_interval(tmp_path: Path) -> None:
    widths = []
    for sources in ({}, {"hellaswag": [str(place // 10) for place in range(600)]}):
        values = [value for value in outcomes(60, 0.5, seed=3) for _ in range(10)]
        result = a_result({"hellaswag": values}, sources=sources)
        result["model"] |= {"source": "hub", "name": "org/third"}
        write(tmp_path / "third", result)
        html, _ = make(write_files(tmp_path, facts()), str(tmp_path))
        _, low, high = map(float, re.findall(r"\d\.\d+", rows(html, "hellaswag")["third"]["Measured [95 %]"]))
        widths.append(high - low)
    assert widths[1] > 2.5 * widths[0]


@pytest.mark.parametrize("values", [[1] * 30, [0] * 30, [1], [1] * 29 + [0]])
def test_intervals_stay_between_0_and_1(values: list[int], tmp_path: Path) -> None:
    write_result(tmp_path, "third", {"hellaswag": values}, "org/third")
    html, _ = make(write_files(tmp_path, facts()), str(tmp_path))
    cell = rows(html, "hellaswag")["third"]["Measured [95 %]"]
    score, low, high = map(float, re.findall(r"\d\.\d+", cell))
    assert 0 <= low <= score <= high <= 1
    assert high - low > 0.05


def hostile(text: str) -> dict[str, Any]:
    return facts(
        title=text,
        question=text,
        sources__card__text=text,
        models__ours__optimizer=text,
        models__ours__note=text,
        models__theirs__licence__name=text,
        models__ours__published__0__harness=text,
        models__ours__published__0__metric=text,
        models__ours__published__0__task=text,
        claims__0__text=text,
        by_data__0__scores={text: 0.7, "other": 0.6},
        by_data__0__task=text,
        by_tokens__0__data=text,
        by_tokens__0__note=text,
    )


LABEL = "__a__.b-c+d"


def test_hostile_texts_are_escaped_in_html_and_markdown(tmp_path: Path) -> None:
    text = f"{NASTY} | a\nb [x](javascript:alert(1)) ![i](http://x/y.png) `c` **d** {{{{ 7*7 }}}}"
    data = hostile(text)
    data["models"][LABEL] = data["models"].pop("theirs")
    data["claims"][0]["reference"] = LABEL
    config = write_files(tmp_path, data, {"ours": "runs/ours", LABEL: text, "third": "x"})
    write_result(tmp_path, LABEL, {text: [1, 0, 1], "hellaswag": [1, 0, 1]}, text, dtype=text, date=text)
    write_result(tmp_path, "ours", {text: [1, 1, 1], "hellaswag": [1, 0, 1]}, "runs/ours", device=text)
    html, markdown = make(config, str(tmp_path))
    page = Page(html)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert [tag for tag, _ in page.tags].count("style") == 1
    assert not {"img", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert all("javascript:" not in str(attributes.get("href")) for _, attributes in page.tags)
    assert LABEL in page.text
    assert NASTY in page.text
    assert "{{ 7*7 }}" in page.text
    rendered = Page(MarkdownIt("commonmark").enable("table").render(markdown))
    assert {tag for tag, _ in rendered.tags} <= {
        *("h1", "h2", "p", "strong", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td")
    }
    for part in (LABEL, NASTY, "[x](javascript:alert(1)) ![i](http://x/y.png) `c` **d** {{ 7*7 }}"):
        assert part in rendered.text


def test_hostile_labels_are_escaped(tmp_path: Path) -> None:
    """A config's labels are names of folders; whoever calls the renderer may have others."""
    label = "<img src=x onerror=alert(1)>|`$x$`[a](javascript:b)\"'*_"
    found = Facts.model_validate(facts(models={label: facts()["models"]["theirs"]}, claims=[]))
    measured: Measured = {
        "models": {label: label},
        "results": {},
        "pairs": [{"title": label, "heads": [label], "rows": [[label]]}],
        "explanations": [label],
        "verdicts": [],
        "notes": [label],
    }
    paths = write_comparison(found, measured, tmp_path, markdown_text)
    page = Page(paths[0].read_text())
    rendered = Page(MarkdownIt("commonmark").enable("table").render(paths[1].read_text()))
    for tags in (page.tags, rendered.tags):
        assert not {"img", "code", "em"} & {tag for tag, _ in tags}
        assert all("javascript" not in f"{attributes.get('href')}{attributes.get('src')}" for _, attributes in tags)
    assert page.text.count(label) > 5
    assert rendered.text.count(label) > 5


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_head(tmp_path: Path) -> None:
    _, markdown = make(CONFIG, out=tmp_path / "out")
    blocks = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(blocks) > 6
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1


def test_the_page_asks_for_nothing_from_the_network(tmp_path: Path) -> None:
    html, _ = make(CONFIG, out=tmp_path / "out")
    for tag, attributes in Page(html).tags:
        assert "src" not in attributes
        if tag == "link":
            assert attributes == {"rel": "icon", "href": "data:,"}
        elif tag != "a":
            assert not str(attributes.get("href", "#")).startswith("http")
    assert not re.search(r"@import|url\((?!#)", html)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    write_result(tmp_path, "ours", {"hellaswag": outcomes(300, 0.6, 1)}, "runs/ours")
    write_result(tmp_path, "theirs", {"hellaswag": outcomes(300, 0.5, 2)}, "org/theirs")
    first = make(config, str(tmp_path), out=tmp_path / "a")
    assert make(config, str(tmp_path), out=tmp_path / "b") == first


def test_a_page_needs_no_facts(tmp_path: Path) -> None:
    html, _ = make(write_files(tmp_path))
    assert "Data efficiency" not in html
    assert rows(html, "As published")["ours"]["Tokens"] == "–"


def test_facts_of_another_name_and_single_results(tmp_path: Path) -> None:
    config = write_files(tmp_path, facts())
    (tmp_path / "facts/page.yaml").rename(tmp_path / "other.yaml")
    folder = write_result(tmp_path / "elsewhere", "x", {"hellaswag": [1, 0, 1]}, "org/third")
    html, _ = make(config, f"third={folder}", "--facts", str(tmp_path / "other.yaml"))
    assert rows(html, "hellaswag")["third"]["Measured [95 %]"].startswith("0.6667")
    assert "1 of 3 models run" in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/nothing"], "nothing: no such file or folder"),
        (["tihrd={root}"], "no model of the config is called 'tihrd'; did you mean third?"),
        (["{root}/a", "{root}/b"], "third has two results: "),
        (["{root}/broken"], "is not the result of an evaluation"),
        (["--facts", "{root}/none.yaml"], "none.yaml: no such config file"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_files(tmp_path, facts())
    for place in ("a", "b"):
        write_result(tmp_path / place, "third", {"hellaswag": [1, 0]}, "org/third")
    write(tmp_path / "broken/third", "{")
    given = [word.format(root=tmp_path) for word in arguments]
    assert main(["compare-page", str(config), *given, "--out", str(tmp_path / "page")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "models: expected at least one model"),
        ("x", "models"),
        ([{"label": "a"}], "models.0.model: required, but missing"),
        ([{"label": "a/b", "model": "x"}], "models.0.label: expected letters"),
        ([{"label": "..", "model": "x"}], "models.0.label: expected letters"),
        ([{"label": "a", "model": "x"}, {"label": "a", "model": "y"}], "models: 2 models are called 'a'"),
        ([{"model": "org/a"}, {"model": "other/a"}], "models: 2 models are called 'a'"),
    ],
)
def test_a_config_without_usable_models_is_refused(
    models: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"models": models}))
    assert main(["compare-page", str(config), "--out", str(tmp_path / "page")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_to_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    config = write_files(tmp_path, facts(), MODELS)
    assert main(["compare-page", str(config), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write the page to" in capsys.readouterr().err
