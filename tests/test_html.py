"""report.html as a parser reads it, beside report.md; and two runs in one report (--compare)."""

import base64
import io
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import test_evaluate
from PIL import Image
from test_evaluate import SHORT, new_report

from evaluation.report import Report, Section, read_report
from main import main

run = test_evaluate.run  # the fixture
MEASURED = ["--eval", "classification,ood", "--ood_datasets", "noise,shuffled"]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, and every table as rows of texts; asserts that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.open, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def tables_of_markdown(text):
    """The cells of every table without its line of dashes."""
    tables = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")]
            rows = [[unescape(cell.strip().replace("\\|", "|")) for cell in line] for line in lines]
            tables.append([rows[0], *rows[2:]])
    return tables


def files_of(report):
    report.write_files()
    return Page((report.directory / "report.html").read_text()), (report.directory / "report.md").read_text()


@pytest.fixture(scope="module")
def evaluated(run):
    """An eval folder of the real command line."""
    return new_report(run, *MEASURED)[1]


def test_the_page_is_whole_by_itself(evaluated):
    page = Page((evaluated / "report.html").read_text())
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(re.match("#|data:image/png;base64,", address) for address in addresses)
    names = json.loads((evaluated / "results.json").read_text())
    pictures = [name for section in ("classification", "ood") for name in names[section]["pictures"]]
    assert len(pictures) >= 3 and [image["alt"] for image in page.all("img")] == pictures
    for image in page.all("img"):
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert content == (evaluated / f"{image['alt']}.png").read_bytes()
        Image.open(io.BytesIO(content)).load()
    assert not page.all("link") and not page.all("script") and "@import" not in page.text
    targets = [section["id"] for section in page.all("section")]
    assert [f"#{target}" for target in targets] == [a["href"] for a in page.all("a")] and len(targets) == 2


def test_both_forms_say_the_same(evaluated):
    page, text = Page((evaluated / "report.html").read_text()), (evaluated / "report.md").read_text()
    tables = tables_of_markdown(text)
    assert page.tables == tables and len(tables) > 5
    results = json.loads((evaluated / "results.json").read_text())
    rows = {row[0]: row for rows in tables for row in rows}
    number = results["classification"]["results"]["accuracy"]
    low, high = number["interval"]
    assert rows["accuracy"][1:3] == [f"{number['value']:.4g} [{low:.4g}, {high:.4g}]", str(number["n"])]
    assert all(rows[name][1] == fact for part in ("about", "environment") for name, fact in results[part].items())
    assert all(number["protocol"] in page.text for number in results["ood"]["results"]["AUROC"]["noise"].values())


def test_nothing_is_taken_for_html(tmp_path):
    nasty = "<img src=x onerror=alert(1)> </script> \" ' & &lt; | {{ 7 * 7 }} \udce9"
    report = Report(tmp_path, {"about": {"data set": nasty}, "options": {}, "environment": {}})
    section = report.sections["classification"] = Section("classification", tmp_path)
    section.add(nasty, 1, 1, nasty)
    section.add(nasty + " table", 2, 2, nasty, at=(nasty, nasty))
    section.note(f"**{nasty}** is marked")
    section.add_absent(nasty, nasty)
    section.picture("one", nasty, np.zeros((2, 2, 3), "u1"))
    page, text = files_of(report)
    printed = nasty.replace("\udce9", "\\udce9")
    assert page.text.count(printed) == 10 and page.text.count(f"{printed} is marked") == 1
    assert len(page.all("img")) == 1 and not page.all("script")
    assert page.tables == tables_of_markdown(text) and len(page.tables) == 3
    assert "<" not in text and unescape(text).count(printed.replace("|", "\\|")) + unescape(text).count(printed) == 10


def changed(evaluated, folder):
    """Another run whose eval folder differs in some places, and what its results.json holds."""
    shutil.copytree(evaluated, folder / "eval")
    path = folder / "eval" / "results.json"
    results = json.loads(path.read_text())
    numbers = results["classification"]["results"]
    numbers["accuracy"] |= {"value": 0.1234, "interval": None}
    numbers["cross-entropy (nats)"]["n"] = 19
    numbers["accuracy of each class"]["3"]["accuracy"]["protocol"] = "by hand"
    results["options"]["n_sample_steps"] = 77
    results["classification"]["notes"] = ["a note of its own"]
    del results["ood"]["results"]["AUROC"]["noise"]
    results["quality"] = results["ood"]
    path.write_text(json.dumps(results))
    Image.new("RGB", (3, 3), "red").save(folder / "eval" / "confusion_matrix.png")
    (folder / "eval" / "ood_log_p_x.png").unlink()
    return results


def test_two_runs_side_by_side(run, evaluated, tmp_path):
    other = changed(evaluated, tmp_path / "other")
    mine, folder = new_report(run, *MEASURED, "--compare", str(tmp_path / "other"))
    page, text = Page((folder / "report.html").read_text()), (folder / "report.md").read_text()
    assert page.tables == tables_of_markdown(text)
    assert all(table[0][1:3] == ["this run", "other run"] for table in page.tables)
    assert page.tables[1][1:] == [["--n_sample_steps", "1", "77"]]
    rows = {row[0]: row[1:] for table in page.tables[2:] for row in table}
    accuracy = mine["classification"]["results"]["accuracy"]
    assert accuracy["value"] != 0.1234 and rows["accuracy"][0].startswith(f"{accuracy['value']:.4g} [")
    assert rows["accuracy"][1:] == ["0.1234", "20", "(1)"]  # the same protocol and number of images: no mark
    assert rows["cross-entropy (nats)"][1].endswith("≠") and rows["cross-entropy (nats)"][2] == "20 / 19"
    assert len(set(rows["log p(x) of test images (nats)"][:2])) == 1
    third = rows["3, accuracy"]
    assert third[1] == f"{third[0]} ≠" and " / " in third[-1] and re.search(r"- \(\d+\) by hand", text)
    assert text.count("≠") == 1 + 2  # the explanation, and the two above
    alone = [row[0] for table in page.tables[2:] for row in table if row[2] == ""]
    assert len(alone) == 4 and all(name.startswith("noise, ") for name in alone)
    assert "Measured in the other run only: quality." in page.text and "other run only: quality." in text
    assert "other run: a note of its own" in page.text
    sources = [base64.b64decode(image["src"].partition(",")[2]) for image in page.all("img")]
    both = [folder / "confusion_matrix.png", tmp_path / "other" / "eval" / "confusion_matrix.png"]
    assert sources[:2] == [path.read_bytes() for path in both]
    assert len(sources) == 2 + 2 * len(mine["ood"]["pictures"]) - 1  # one is missing there
    for name in re.findall(r"\]\((\S+\.png)\)", text):
        Image.open(folder / name).load()
    assert "0.1234" not in (folder / "results.json").read_text() and other["about"] == mine["about"]


def test_numbers_on_other_images_are_all_marked(evaluated, tmp_path):
    changed(evaluated, tmp_path)
    report = read_report(str(evaluated))
    report.other = read_report(str(tmp_path / "eval"))
    newer = shutil.copytree(tmp_path / "eval", tmp_path / "eval-2", copy_function=shutil.copyfile)
    assert read_report(str(tmp_path)).directory == newer
    report.directory = tmp_path
    report.other.header["about"]["images"] = "other ones"
    text = files_of(report)[1]
    both = [(section, report.other.sections[name]) for name, section in report.sections.items()]
    n = sum(len(one.measurements().keys() & other.measurements().keys()) for one, other in both)
    assert text.count("≠") == 1 + n and re.search(r"\| 360, digest \w{32} \| other ones", text)
    report.other.directory, report.other.sections = Path("o\udcff"), {}
    assert "The other report, o\\udcff, has no results" in files_of(report)[1]


NUMBER = {"value": "one", "interval": None, "n": 2, "protocol": "p"}
SECTION = {"results": {"a": NUMBER}, "notes": [], "absent": {}, "pictures": {}}
WRONG_NUMBER = {"about": {}, "options": {}, "environment": {}, "classification": SECTION}
ABSENT = [WRONG_NUMBER | {"classification": SECTION | {"results": {}, "absent": x}} for x in ([], {"x": "\udce9"})]
BROKEN = {"torn": "{", "deep": "[" * 100_000, "list": "[]"}
BROKEN |= {name: json.dumps(x) for name, x in zip(("number", "absent", "text"), (WRONG_NUMBER, *ABSENT), strict=True)}


@pytest.mark.parametrize("place", ["nowhere", "", "x" * 300, "empty", *BROKEN])
def test_no_results_or_broken_ones_are_one_line_before_anything_is_measured(place, run, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty" / "eval").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    message = "no results.json there or in its folder eval" if place else "--compare is empty"
    if place in BROKEN:
        Path(place).mkdir()
        Path(place, "results.json").write_text(BROKEN[place])
        message = f"--compare {tmp_path / place / 'results.json'} is broken"
    before = sorted(run.rglob("*"))
    assert main([*SHORT[:-2], "--load_ckpt", str(run), "--eval", "classification", "--compare", place]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.strip().splitlines()) == 1 and "classification ..." not in out
    assert sorted(run.rglob("*")) == before
