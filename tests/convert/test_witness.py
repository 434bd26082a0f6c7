"""The witness's recipe: its text is told apart, it learns, and it goes on after a kill."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from apertus_mlx.checkpoint.config import parse_config, read_config
from apertus_mlx.checkpoint.tensors import open_checkpoint
from apertus_mlx.model import apertus
from benchmarks.witness import fetching, network, publishing, training
from benchmarks.witness.fetching import fetch, files
from benchmarks.witness.geometry import SIZES, Size, choose
from benchmarks.witness.network import head_loss, xielu
from benchmarks.witness.pages import paragraphs
from benchmarks.witness.sources import PACKAGES, language_tag
from benchmarks.witness.texts import LEAST_CHARACTERS, Page, divide, part_of
from benchmarks.witness.training import Plan, Trainer, read_plan

TINY = Size("tiny", 64, 128, 1, 320)
PLAN = Plan(TINY, "", steps=24, rows=4, window=16, rate=0.01)

ROFF = rb""".\" -*- coding: UTF-8 -*-
.TH LS 1 "2022" "GNU coreutils" "Dienstprogramme"
.SH BESCHREIBUNG
.PP
Auflistung von \fBInformationen\fP \(Fc\-\-(standardm\[u00E4]\[ss]ig)
.I aktuelles
Verzeichnis \en f\(:ur alles\&. \" not this
.nf
ls  -l   | sort     # no prose, whatever it says here
.fi
.TP
\fB\-a\fP
short
"""
HTML = b"""<html><head><title>A title that nobody reads here</title></head><body>
<div class="navheader"><div>Zur\xc3\xbcck zum Anfang dieser Seite</div> und weiter</div>
<p>Ein Absatz &uuml;ber <code>apt</code>, mit <b>fetten</b> Worten.<br>Noch eine Zeile.</p>
<pre>ls -l /usr/share and many other words</pre><p>kurz</p></body></html>"""
MALLARD = b"""<page xmlns="http://projectmallard.org/1.0/"><info><link type="guide" xref="a"/>
<desc>What this page is about, which is no text.</desc></info>
<title>Vergr\xc3\xb6\xc3\x9fern Sie das ganze Bild</title>
<p>Dr\xc3\xbccken Sie auf <gui>Barrierefreiheit</gui>, um zu beginnen.</p></page>"""


def test_pages_become_prose() -> None:
    """Worked out by hand from what each form means."""
    assert paragraphs(ROFF, "roff") == [
        "Auflistung von Informationen »--(standardmäßig) aktuelles Verzeichnis \\n für alles."
    ]
    assert paragraphs(HTML, "html") == ["Ein Absatz über apt, mit fetten Worten.Noch eine Zeile."]
    assert paragraphs(MALLARD, "mallard") == [
        "Vergrößern Sie das ganze Bild",
        "Drücken Sie auf Barrierefreiheit, um zu beginnen.",
    ]


def test_held_out_pages_share_nothing_with_training() -> None:
    """Not a paragraph, though pages repeat each other's, in another case or another language."""
    rng = np.random.default_rng(3)
    common = [" ".join(map(str, rng.integers(0, 9**9, 30))) for _ in range(40)]
    pages = [
        Page(language, f"page {number}", [
            *(f"{language} {number} {i} " + "word " * 20 for i in range(4)),
            *(str(text).upper() if language == "de" else text for text in
              rng.choice(common, 3)),
        ])
        for language in ("en", "de", "fr") for number in range(400)
    ]  # fmt: skip
    pages.append(Page("rm", "page 1", ["pitschen text", "in auter text", "in terz text"]))
    corpus = divide(pages)
    assert all(set(texts) == {"en", "de", "fr"} for texts in corpus.values())
    assert min(sum(map(len, t)) for t in corpus["training"].values()) > LEAST_CHARACTERS / 2
    parts = {
        part: [
            " ".join(paragraph.split()).lower()
            for texts in languages.values() for text in texts for paragraph in text.split("\n\n")
        ]
        for part, languages in corpus.items()
    }  # fmt: skip
    every = [paragraph for found in parts.values() for paragraph in found]
    assert len(every) == len(set(every))
    assert set(map(str.lower, common)) & set(every)
    training = "\n".join(parts["training"])
    assert all(text not in training for part in ("judged", "calibration") for text in parts[part])


def test_a_page_is_held_out_in_all_languages_at_once() -> None:
    shares = [part_of(f"page.{number}") for number in range(4000)]
    for part in ("judged", "calibration"):
        assert 0.02 < shares.count(part) / len(shares) < 0.04


@pytest.mark.parametrize(
    ("path", "package", "language", "page"),
    [
        ("usr/share/man/man1/ls.1.gz", "manpages", "en", "ls.1"),
        ("usr/share/man/pt_BR/man8/mount.8.gz", "manpages-pt-br", "pt-BR", "mount.8"),
        ("usr/share/man/zh_CN/man1/ls.1.gz", "manpages-zh", "zh", "ls.1"),
        ("usr/share/help/C/gnome-help/a11y.page", "gnome-user-docs", "en", "gnome-help/a11y"),
        ("usr/share/help/sr@latin/x/y.page", "gnome-user-docs", "sr-Latn", "x/y"),
        ("usr/share/doc/debian-handbook/html/nb-NO/apt.html", "debian-handbook", "nb", "apt"),
    ],
)
def test_paths_say_language_and_page(path: str, package: str, language: str, page: str) -> None:
    [source] = [each for each in PACKAGES if each.name == package]
    match = source.pages.fullmatch(path)
    assert match is not None
    assert (language_tag(match["language"]), match["page"]) == (language, page)


def test_a_package_is_read_and_another_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An `ar` archive as its format has it; only the pinned sum is taken."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:xz") as archive:
        entry = tarfile.TarInfo("./usr/share/doc/a.html")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"prose"))
    data = b"!<arch>\n"
    for name, content in ((b"debian-binary", b"2.0"), (b"data.tar.xz", inner.getvalue())):
        data += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name, 0, 0, 0, b"100644", len(content))
        data += content + b"\n" * (len(content) % 2)
    (tmp_path / "manpages.deb").write_bytes(data)
    assert list(files(tmp_path / "manpages.deb")) == [("usr/share/doc/a.html", b"prose")]
    mine = replace(PACKAGES[0], sha256=hashlib.sha256(data).hexdigest())
    assert fetch(mine, tmp_path) == tmp_path / "manpages.deb"
    monkeypatch.setattr(fetching.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="needs apt-get"):
        fetch(PACKAGES[0], tmp_path)


def test_the_activation_and_its_gradients_are_the_models() -> None:
    x = mx.random.normal((3, 40, 8), key=mx.random.key(1)) * 3
    weight = mx.random.normal(x.shape, key=mx.random.key(2))
    slopes = (mx.array([0.7]), mx.array([1.3]))
    beta, eps = 0.5, -1e-6

    def expected(x: mx.array, p: mx.array, n: mx.array) -> mx.array:
        return (apertus.xielu(x, p, n, mx.array(beta), mx.array(eps)) * weight).sum()

    def found(x: mx.array, p: mx.array, n: mx.array) -> mx.array:
        return (xielu(x, p, n, beta, eps) * weight).sum()

    for first, second in zip(
        tree_flatten(mx.value_and_grad(expected, (0, 1, 2))(x, *slopes)),
        tree_flatten(mx.value_and_grad(found, (0, 1, 2))(x, *slopes)), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(np.array(second[1]), np.array(first[1]), rtol=1e-4, atol=1e-5)


def test_the_loss_and_its_gradients_are_mlxs() -> None:
    hidden = mx.random.normal((300, 16), key=mx.random.key(1))
    table = mx.random.normal((50, 16), key=mx.random.key(2))
    targets = np.random.default_rng(0).integers(0, 50, 300)

    def expected(hidden: mx.array, table: mx.array) -> mx.array:
        return 3 * nn.losses.cross_entropy(hidden @ table.T, mx.array(targets), reduction="mean")

    def found(hidden: mx.array, table: mx.array) -> mx.array:
        return 3 * head_loss(hidden, table, targets)

    for first, second in zip(
        tree_flatten(mx.value_and_grad(expected, (0, 1))(hidden, table)),
        tree_flatten(mx.value_and_grad(found, (0, 1))(hidden, table)), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(np.array(second[1]), np.array(first[1]), rtol=1e-4, atol=1e-6)


def test_it_learns_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    """Losses and weights are equal in bits, wherever it stopped after its last save."""
    ids = np.tile(np.random.default_rng(0).integers(0, 320, 40), 40).astype(np.uint16)
    whole = Trainer(PLAN, ids, tmp_path / "whole")
    for _ in range(PLAN.steps):
        whole.step()
    assert np.mean(whole.losses[-4:]) < 0.8 * np.mean(whole.losses[:4])

    PLAN.write(tmp_path / "plan.json")
    killed = Trainer(read_plan(tmp_path / "plan.json"), ids, tmp_path / "killed")
    for _ in range(9):
        killed.step()
    killed.save()
    killed.step()
    again = Trainer(read_plan(tmp_path / "plan.json"), ids, tmp_path / "killed")
    assert again.done == 9
    again.run(ids[: 17 * 4].astype(np.int32).reshape(4, 17))
    assert again.losses == whole.losses
    expected, found = (dict(tree_flatten(each.model.parameters())) for each in (whole, again))
    assert expected.keys() == found.keys()
    assert all(bool(mx.array_equal(expected[name], found[name])) for name in expected)


@pytest.mark.parametrize(
    "compiled",
    [False, pytest.param(True, marks=[pytest.mark.nightly, pytest.mark.timeout(900)])],
    ids=["plain", "compiled"],
)
def test_mlx_and_numpy_train_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """What a GPU would compute, here on the CPU, from the same weights; it goes on as well."""
    ids = np.random.default_rng(0).integers(0, 320, 2000).astype(np.uint16)
    ours = Trainer(PLAN, ids, tmp_path / "numpy")
    monkeypatch.setattr(network, "has_gpu", lambda: True)
    monkeypatch.setattr(training, "has_gpu", lambda: compiled)
    plain = Trainer(PLAN, ids, tmp_path / "mlx")
    for step in range(6):
        ours.step()
        if step == 3:
            plain.save()
            plain = Trainer(PLAN, ids, tmp_path / "mlx")
        plain.step()
    np.testing.assert_allclose(ours.losses, plain.losses, rtol=1e-4)


def test_a_run_reads_every_window_once_before_any_again(tmp_path: Path) -> None:
    ids = np.arange(16 * 10 + 1).astype(np.uint16)
    trainer = Trainer(replace(PLAN, rows=2), ids, tmp_path)
    starts = [row[0] for step in range(5) for row in trainer._batch(step)]
    assert sorted(starts) == list(range(0, 160, 16))
    assert [row[0] for step in range(5, 10) for row in trainer._batch(step)] != starts


def test_the_folder_is_a_checkpoint_of_small_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "MOST_FILE_BYTES", publishing._HEADER_BYTES + 50_000)
    weights = dict(tree_flatten(apertus.Model(parse_config(TINY.config)).parameters()))
    (tmp_path / "tokenizer.json").write_text("{}")
    target = tmp_path / "model"
    publishing.publish(target, TINY.config, weights, tmp_path / "tokenizer.json", {"steps": 1})
    shards = list(target.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(path.stat().st_size <= publishing.MOST_FILE_BYTES for path in shards)
    read_config(target)
    assert open_checkpoint(target).tensors.keys() == weights.keys()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        stored = mx.load(str(target / file))
        assert isinstance(stored, dict)
        assert bool(mx.array_equal(stored[name], weights[name].astype(mx.bfloat16)))


def test_sizes() -> None:
    """The largest is what was asked for; none has a tensor that outgrows a file."""
    assert 25e6 <= SIZES[0].weights <= 30e6
    for size in SIZES:
        assert 2 * size.vocab_size * size.hidden < publishing.MOST_FILE_BYTES - 64_000


def test_the_largest_size_that_sees_enough_is_chosen() -> None:
    # Speeds that fall with size, as on a machine of 60 GFLOP a second.
    def speed(size: Size) -> float:
        return 1e10 / size.weights

    assert choose(SIZES, 8 * 60 * 100, speed)[0] is SIZES[0]
    chosen, found = choose(SIZES, 30 * 60, speed)
    assert chosen.name == "5M" and found == speed(chosen)
    assert choose(SIZES, 1, speed)[0] is SIZES[-1]
