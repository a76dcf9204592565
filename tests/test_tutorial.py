"""The tutorial has every equation of the family beside its code, in two languages."""

import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from agreement import OPTIMIZERS
from scripts import is_a_picture, load

import adamx

DOCS = Path(__file__).parents[1] / "docs"
NAMES = sorted(path.name for path in (DOCS / "tutorial").glob("*.md"))
INDEX = (DOCS / "tutorial/equations.md").read_text()
CONCEPTS = [name for name in NAMES if name not in ("index.md", "equations.md")]

# the lines of Momentum, RMSprop, Adam, AdamW and L2, where each has to stand
M_HAT, V_HAT = r"\frac{m_t}{1-\beta_1^t}", r"\frac{v_t}{1-\beta_2^t}"
STEP = r"\alpha\frac{\hat{m}_t}{\sqrt{\hat{v}_t}+\varepsilon}"
EQUATIONS = [
    ("ema.md", r"m_t \leftarrow \beta m_{t-1} + (1-\beta) g_t"),
    ("ema-of-squares.md", r"v_t \leftarrow \beta v_{t-1} + (1-\beta) g_t^2"),
    ("bias-correction.md", rf"\hat{{m}}_t \leftarrow {M_HAT}"),
    ("bias-correction.md", rf"\hat{{v}}_t \leftarrow {V_HAT}"),
    ("weight-decay.md", r"f(w) = L(w, b) + \frac{\lambda}{2}||w||^2"),
    ("momentum.md", r"w_{t+1} \leftarrow w_t - \alpha m_t"),
    ("momentum.md", r"m_t \leftarrow \beta m_{t-1} + (1-\beta) g_t"),
    ("rmsprop.md", r"w_t \leftarrow w_{t-1} - \frac{\alpha_t}{\sqrt{v_t}+\varepsilon} g_t"),
    ("rmsprop.md", r"v_t \leftarrow \beta v_{t-1} + (1-\beta) g_t^2"),
    ("adam.md", r"t \leftarrow t+1"),
    ("adam.md", r"g_t \leftarrow \nabla f_t(w_{t-1})"),
    ("adam.md", r"m_t \leftarrow \beta_1 m_{t-1} + (1-\beta_1) g_t"),
    ("adam.md", r"v_t \leftarrow \beta_2 v_{t-1} + (1-\beta_2) g_t^2"),
    ("adam.md", rf"\hat{{m}}_t \leftarrow {M_HAT}"),
    ("adam.md", rf"\hat{{v}}_t \leftarrow {V_HAT}"),
    ("adam.md", rf"w_t \leftarrow w_{{t-1}} - {STEP}"),
    ("adamw.md", rf"w_t \leftarrow (1-\alpha\lambda) w_{{t-1}} - {STEP}"),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DISPLAY = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.MULTILINE | re.DOTALL)


def parts(path):
    """Return what the two languages have in common: levels of headings, code, formulas, links."""
    text = path.read_text()
    prose = FENCE.sub("", text)
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "code": FENCE.findall(text),
        "display": DISPLAY.findall(text),
        # word order may differ within a paragraph
        "inline": sorted(re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", DISPLAY.sub("", prose))),
        "names": sorted(set(re.findall(r"`([^`\n]+)`", prose))),
        "links": [Path(link).name for link in re.findall(r"\]\(([^)]+)\)", prose)],
    }


@pytest.mark.parametrize("name", NAMES)
def test_both_languages_have_the_same_code_formulas_and_headings(name):
    assert parts(DOCS / "zh/tutorial" / name) == parts(DOCS / "tutorial" / name)


def test_both_languages_have_the_same_pages():
    assert sorted(path.name for path in (DOCS / "zh/tutorial").iterdir()) == NAMES


@pytest.mark.parametrize(("name", "equation"), EQUATIONS)
def test_each_equation_stands_on_its_page(name, equation):
    assert equation in parts(DOCS / "tutorial" / name)["display"]


@pytest.mark.parametrize("name", CONCEPTS)
def test_each_equation_is_followed_by_code_that_checks_it(name):
    text = (DOCS / "tutorial" / name).read_text()
    for equation in DISPLAY.finditer(text):
        blocks = [fence[2] for fence in FENCE.finditer(text, equation.end())]
        assert any("assert" in block for block in blocks[:2]), equation[1]


@pytest.mark.parametrize(("name", "equation"), EQUATIONS)
def test_the_index_has_each_equation(name, equation):
    """A bar would end the cell."""
    norm = r"\lVert w\rVert"
    assert f"| ${equation.replace('||w||', norm)}$ |" in INDEX


@pytest.mark.parametrize("section", INDEX.split("\n## ")[1:], ids=lambda text: text.split("\n")[0])
def test_what_the_index_says_is_so(section):
    """Of the code, the printed lines, the change that takes a term out, and the test that fails."""
    names: dict[str, Any] = {"adamx": adamx}
    exec(FENCE.findall(section)[0][1], names)
    tx = names["tx"]
    printed = " ".join(repr(tx).split())
    summary = str(adamx.summary(tx, {"w": jnp.zeros((2, 2), jnp.bfloat16)}))
    mutants = tomllib.loads((DOCS.parent / ".ci/mutants.toml").read_text())["mutant"]
    known = {mutant["id"]: mutant for mutant in mutants}
    rows = re.findall(r"^\| .*\$.* \|$", section, re.MULTILINE)
    assert rows
    for row in rows:
        _, code, line, shown, out = (re.findall(r"`([^`]+)`", cell) for cell in row.split(" | "))
        assert all(" ".join(text.split()) in printed or text == "tx" for text in line)
        assert all(text in summary for text in shown)
        if out == ["tx"]:
            assert "yours" in row
            continue
        file, expression = code
        assert expression in (DOCS.parent / "adamx" / file).read_text()
        *changes, test = out
        assert changes and set(changes) <= known.keys()
        if found := re.fullmatch(r"\[(\w+)-[ab]\]", test):
            assert found[1] in OPTIMIZERS
            assert all("agreement" in known[change]["tests"] for change in changes)
        else:
            path, function = test.split("::")
            assert f"def {function}(" in (DOCS.parent / path).read_text()


@pytest.mark.slow
def test_the_pictures_of_the_tutorial_are_those_of_the_example(tmp_path):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        paths = load("tutorial_pictures").main(["--output", str(tmp_path)])
    assert all(is_a_picture(path) for path in paths)
    for name in CONCEPTS:
        picture = f"tutorial_{name.removesuffix('.md').replace('-', '_')}.png"
        assert parts(DOCS / "tutorial" / name)["links"].count(picture) == 1, name
    drawn = sorted(path.name for path in paths)
    assert drawn == sorted(path.name for path in (DOCS / "images").glob("tutorial_*"))
    assert len(drawn) == len(CONCEPTS)
