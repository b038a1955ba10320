import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from gardo.report import main
from gardo.run.metrics import MetricsWriter
from gardo.run.report import ReportError, load_run, write_report
from gardo.run.report.build import spread
from gardo.run.report.curves import sections
from gardo.run.report.load import Series, load_runs
from gardo.run.report.tables import (
    config_differences,
    number,
)
from tests.run.synthetic_run import make_run, metrics_row

DASH = "–"


class Page(HTMLParser):
    """Tags that are balanced, every address that is used, the ids, and the visible text."""

    VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self, html):
        super().__init__()
        self.addresses, self.ids, self.open, self.text, self.tags = [], [], [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)
            assert not name.startswith("on"), "no scripts"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="module")
def html(run_dir):
    return write_report([run_dir], run_dir / "report.html").read_text(encoding="utf-8")


def rows_of(html, start):
    """Cells of the table rows behind the heading that contains `start`."""
    part = html[html.index(start) :]
    part = part[: part.index("</table>")]
    rows = re.findall(r"<tr.*?</tr>", part, re.DOTALL)
    cells = [re.findall(r"<td.*?</td>", row, re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]+>", "|", c).strip("|") for c in row] for row in cells if row]


def test_the_page_is_whole_and_asks_for_nothing(html):
    page = Page(html)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.addresses
    for address in page.addresses:
        assert address.startswith(("data:image/", "#"))
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert len(page.ids) == len(set(page.ids)), "ids of the drawings collide"
    inside = set(re.findall(r"url\(#([^)]+)\)", html))
    inside |= {a[1:] for a in page.addresses if a[0] == "#"}
    assert inside <= set(page.ids)
    assert len(html) < 1_000_000


def test_head_says_what_was_run(html):
    text = " ".join(Page(html).text.split())
    for expected in (
        "GRPO + gated KL + adaptive reference + diversity-aware advantage",
        "finished, 24 of 24 epochs",
        "builtin:tiny-sd3",
        "python -m gardo.train tiny --seed 42",
        "gardo 0.1.0, torch 2.13.0, diffusers 0.42.0",
        "CPU, 2 cores",
        "1:02",
        "1.15 GiB",
        "2026-01-05 10:00 UTC",
        "gate paper",
        "reference reset every 10",
        "Evaluation settings: num_steps 10, guidance_scale 1, seed 0, weights live, images 64",
    ):
        assert expected in text


def test_first_and_last_come_from_the_files(html):
    first, last = metrics_row(0), metrics_row(23)
    rows = rows_of(html, "Training prompts")
    assert [r[0].split("|")[0] for r in rows] == ["count", "shape", "cleanliness"]
    assert rows[0][1:3] == [f"{r['reward/count/mean']:.4f}" for r in (first, last)]
    rows = rows_of(html, "Held-out prompts")
    assert [r[0].split("|")[0] for r in rows] == [
        "count",
        "strict",
        "artefact",
        "diversity/pairwise",
    ]
    assert rows[1][1:4] == ["0.5500", "0.6700", "+0.1200 (+22\u202f%)"]


def test_every_curve_is_there(html):
    for title in (
        "count (proxy)", "shape (auxiliary)", "cleanliness (auxiliary)", "strict", "artefact",
        "diversity/pairwise", "Gate share", "Uncertainty", "KL to the reference", "Diversity",
        "Policy loss", "Gradient norm", "Ratio deviation", "Clip fraction", "Images per second",
        "KL&#39;s gradient share", "KL coefficient", "Cap share", "Cap allowance", "Advantages",
        "Reward scale",
    ):  # fmt: skip
        assert f"<h3>{title}</h3>" in html
    assert html.count('<svg role="img"') == 21
    assert "#fe0" not in html  # every placeholder became a variable of the stylesheet
    assert "<metadata>" not in html


def test_curves_hold_the_values_and_the_resets(run_dir):
    panels = {p.title: p for _, group in sections([load_run(run_dir)]) for p in group}
    kl = panels["KL to the reference"]
    assert kl.curves[0].series == Series(list(range(24)), [2.8e-5 * (e % 10) for e in range(24)])
    assert [epoch for epoch, _ in kl.marks] == [9, 19]
    proxy = panels["count (proxy)"]
    assert [(c.label, c.style) for c in proxy.curves] == [
        ("training prompts", "line"),
        ("held-out prompts", "dots"),
    ]
    assert proxy.curves[1].series.epochs == [0, 12, 24]


def test_a_drawing_has_one_point_per_epoch_and_a_gap_for_null(tmp_path):
    run = tmp_path / "run"
    with MetricsWriter(run / "metrics.jsonl") as writer:
        for epoch in range(20):
            writer.write({"epoch": epoch, "kl": float("nan") if epoch == 7 else epoch**2})
    (panel,) = [p for _, group in sections([load_run(run)]) for p in group]
    (path,) = re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--s0\)', panel.svg)
    commands = re.findall(r"[ML]", path)
    assert len(commands) == 19
    assert commands.count("M") == 2  # before and after the gap


def test_clipping_by_the_advantages_sign_is_told_apart(run_dir, tmp_path):
    panels = {p.title: p for _, group in sections([load_run(run_dir)]) for p in group}
    clip = panels["Clip fraction"]
    assert clip.legend == [
        ("all samples", 0, "line"),
        ("advantage above 0", 1, "dash"),
        ("advantage below 0", 2, "dots"),
    ]
    assert clip.curves[2].series.values == [
        metrics_row(e)["clip_fraction/negative"] for e in range(24)
    ]
    with MetricsWriter(tmp_path / "old" / "metrics.jsonl") as writer:
        writer.write({"epoch": 0, "clip_fraction": 0.5, "kl": 1e-4})
    panels = [p for _, group in sections([load_run(tmp_path / "old")]) for p in group]
    assert [(p.title, len(p.curves), p.legend) for p in panels] == [
        ("KL to the reference", 1, []),
        ("Clip fraction", 1, []),
    ]


def test_images_are_embedded_with_their_titles(html, run_dir):
    import base64

    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    files = [run_dir / "images" / f"epoch_{e:04d}.png" for e in (0, 12, 24)]
    assert [base64.b64decode(u) for u in uris] == [f.read_bytes() for f in files]
    for title in ("start", "during", "end"):
        assert f'alt="{title}"' in html


def test_text_from_disk_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    run = make_run(tmp_path / "run", rewards={"proxy": evil, "aux": [evil]}, recipe=evil)
    with MetricsWriter(run / "metrics.jsonl", resume_epoch=24) as writer:
        writer.write({"epoch": 24, f"reward/{evil}/mean": 0.5, "$\\frac{": 1.0})
    (run / "summary.json").write_text(json.dumps({"command": evil, "versions": {evil: evil}}))
    index = json.loads((run / "images" / "index.json").read_text())
    index[0]["title"] = evil
    (run / "images" / "index.json").write_text(json.dumps(index))
    page = write_report([run], tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert Page(page).open == []


def test_several_runs_are_overlaid_and_compared(tmp_path, run_dir):
    other = make_run(tmp_path / "fast", gain=2.0, seed=7, algorithm={"name": "grpo", "kl_coef": 0})
    out = write_report([run_dir, other], tmp_path / "sub" / "cmp.html")
    page = out.read_text(encoding="utf-8")
    text = " ".join(Page(page).text.split())
    assert "Comparison of full, fast" in text
    assert "GRPO + no KL penalty" in text
    rows = rows_of(page, "Training prompts, last epoch")
    assert rows[0][0] == "count"
    assert [c.split("|")[0] for c in rows[0][1:]] == [
        number(metrics_row(23)["reward/count/mean"]),
        number(metrics_row(23, gain=2.0)["reward/count/mean"]),
    ]
    differences = dict(config_differences(load_runs([run_dir, other])))
    assert differences["seed"] == ["42", "7"]
    assert differences["algorithm.diversity"] == ["True", DASH]
    assert "epochs" not in differences
    panels = {p.title: p for _, g in sections(load_runs([run_dir, other])) for p in g}
    looks = [(c.colour, c.style) for c in panels["Gate share"].curves]
    assert looks == [(0, "line"), (0, "dash"), (1, "line"), (1, "dash")]


def test_runs_of_one_name_get_different_labels(tmp_path):
    runs = [make_run(tmp_path / f"{x}" / "gardo", epochs=1) for x in "ab"]
    assert [r.label for r in load_runs(runs)] == ["a/gardo", "b/gardo"]
    assert [r.label for r in load_runs([runs[0], runs[0]])] == ["a/gardo (1)", "a/gardo (2)"]


@pytest.mark.parametrize(
    "keep",
    [{"config.yaml"}, {"metrics.jsonl"}, {"metrics.jsonl", "evaluation.jsonl"},
     {"config.yaml", "images"}, {"config.yaml", "evaluation.jsonl"}],
)  # fmt: skip
def test_parts_of_a_run_are_enough(tmp_path, keep):
    import shutil

    run = make_run(tmp_path / "run")
    for path in run.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_report([run], tmp_path / "out.html").read_text(encoding="utf-8")
    assert Page(page).open == []
    assert ("<svg role" in page) == bool(keep & {"metrics.jsonl", "evaluation.jsonl"})
    assert ("data:image/png" in page) == ("images" in keep)
    assert f"<dt>Hardware</dt><dd>{DASH}</dd>" in page
    assert "nan" not in Page(page).text.lower()


def test_a_run_that_still_goes_has_a_report(tmp_path):
    run = make_run(tmp_path / "run", epochs=3)
    (run / "summary.json").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "kl"')
    text = " ".join(Page(write_report([run], tmp_path / "o.html").read_text()).text.split())
    assert "not finished, 3 of 24 epochs" in text
    assert "metrics.jsonl: the last line is unfinished" in text


def test_pictures_that_cannot_be_shown_are_reported(tmp_path):
    run = make_run(tmp_path / "run", epochs=4)
    (run / "images" / "epoch_0000.png").write_bytes(b"no picture")
    whole = (run / "images" / "epoch_0002.png").read_bytes()
    (run / "images" / "epoch_0002.png").write_bytes(whole[: len(whole) // 2])
    (run / "images" / "epoch_0004.png").unlink()
    page = write_report([run], tmp_path / "o.html").read_text(encoding="utf-8")
    assert "images/epoch_0000.png is not a PNG." in page
    assert "images/epoch_0002.png cannot be read" in page
    assert "images/epoch_0004.png is listed but missing." in page
    assert "<img" not in page


def test_large_pictures_are_reduced(tmp_path):
    import base64
    import io

    from PIL import Image

    from gardo.run.images import save_grid

    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 1\n")
    save_grid(run / "images", Image.new("RGB", (4800, 1200), (200, 10, 10)), 0, "big")
    page = write_report([run], run / "report.html").read_text()
    (uri,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    with Image.open(io.BytesIO(base64.b64decode(uri))) as image:
        assert (image.format, image.size) == ("JPEG", (2400, 600))


def test_many_grids_are_thinned_out_evenly():
    assert spread(list(range(10)), 5) == [0, 2, 4, 7, 9]
    assert spread(list(range(3)), 5) == [0, 1, 2]


@pytest.mark.parametrize(
    ("files", "text"),
    [({}, "not a run"),
     ({"metrics.jsonl": '{"epoch": 0}\nbroken\n'}, "metrics.jsonl, line 2"),
     ({"metrics.jsonl": '{"kl": 0}\n'}, "object 1: no integer 'epoch'"),
     ({"metrics.jsonl": "", "evaluation.jsonl": "[]\n"}, "evaluation.jsonl, line 1"),
     ({"config.yaml": "a: [1\nb: {"}, "config.yaml: not YAML"),
     ({"config.yaml": "- a\n"}, "config.yaml: expected a mapping"),
     ({"config.yaml": "", "summary.json": "{"}, "summary.json: not JSON"),
     ({"config.yaml": "", "images/index.json": "{}"}, "index.json: expected a list")],
)  # fmt: skip
def test_folders_without_a_report_end_in_one_line(tmp_path, capsys, files, text):
    run = tmp_path / "run"
    run.mkdir()
    for name, content in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(content)
    with pytest.raises(ReportError, match=re.escape(text)):
        load_run(run)
    assert main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert text in error
    assert not (run / "report.html").exists()


def test_other_mistakes_of_the_user(tmp_path, capsys):
    run = make_run(tmp_path / "run", epochs=1)
    (tmp_path / "file").write_text("")
    for arguments, text in [
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path / "file"], "not a folder"),
        ([run, "--out", tmp_path / "file" / "x.html"], "cannot write"),
    ]:
        assert main([str(a) for a in arguments]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="run_dirs"):
        write_report([], tmp_path / "x.html")


def test_command_line_writes_next_to_the_run_or_here(tmp_path, capsys, monkeypatch):
    runs = [make_run(tmp_path / name, epochs=2) for name in ("a", "b")]
    monkeypatch.chdir(tmp_path)
    assert main([str(runs[0])]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")
    assert main([str(r) for r in runs]) == 0
    assert (tmp_path / "comparison.html").is_file()
    assert main([str(runs[0]), "--out", str(tmp_path / "o" / "x.html")]) == 0
    assert (tmp_path / "o" / "x.html").is_file()


def test_help_and_import_are_light():
    code = (
        "import sys\n"
        "import gardo.report, gardo.run.report\n"
        "heavy = {'torch', 'matplotlib', 'jinja2', 'diffusers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(gardo.report.main(['--help']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "RUN [RUN ...]" in result.stdout


def test_a_report_is_the_same_twice(tmp_path, run_dir, html):
    again = write_report([run_dir], tmp_path / "again.html").read_text(encoding="utf-8")
    assert again == html
