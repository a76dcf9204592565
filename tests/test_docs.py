"""The blocks of README and docs run; what they name is there; every public name is documented."""

import collections
import doctest
import importlib.util
import inspect
import re
from pathlib import Path

import jax
import pytest

import adamx

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# the Chinese pages have the blocks of the English ones, as test_tutorial.py asserts, and
# test_clients.py runs each block of clients.md
RUN = [p for p in PAGES if "zh" not in p.relative_to(ROOT).parts and p.name != "clients.md"]
BLOCK = re.compile(r"^```(python|pycon|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, kind):
    return [text for found, text in BLOCK.findall(page.read_text()) if found == kind]


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.parent == ROOT / "docs" else ())
        for page in RUN
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_every_python_block_of_a_page_runs(page):
    # as users run: the blocks use Optax, Flax and Equinox, which do not run under strict promotion
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        namespace: dict[str, object] = {}
        for text in blocks(page, "python"):
            exec(compile(text, page.name, "exec"), namespace)
        for text in blocks(page, "pycon"):
            test = doctest.DocTestParser().get_doctest(text, namespace, page.name, None, 0)
            assert doctest.DocTestRunner().run(test).failed == 0


def test_the_readme_has_the_two_commands():
    assert len(blocks(ROOT / "README.md", "sh")) == 2


def test_files_and_tests_that_the_pages_name_exist():
    elsewhere = (ROOT / "tests" / "test_elsewhere.py").read_text()
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(((?!https?:)[^)#]+)\)", text):
            assert (page.parent / link).exists(), (page.name, link)
        for name in re.findall(r"`((?:tests|examples|benchmarks|adamx|docs)/[\w/.-]+)`", text):
            assert (ROOT / name).exists(), (page.name, name)
        for test in re.findall(r"`(test_\w+)`", text):
            assert f"def {test}(" in elsewhere, (page.name, test)


def test_every_test_of_elsewhere_is_a_line_of_the_page_on_swapping():
    tests = re.findall(r"^def (test_\w+)", (ROOT / "tests/test_elsewhere.py").read_text(), re.M)
    lines = re.findall(r"`(test_\w+)` \|", (ROOT / "docs/swap-in-for-optax.md").read_text())
    assert sorted(tests) == sorted(lines)


def in_natural_order(name):
    """Capitals first, and packed8 before packed16."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def test_public_names_are_sorted_unique_and_there():
    assert adamx.__all__ == sorted(set(adamx.__all__), key=in_natural_order)
    modules = {name for name, value in vars(adamx).items() if inspect.ismodule(value)}
    public = {name for name in vars(adamx) if not name.startswith("_")} - modules
    assert public == set(adamx.__all__)


@pytest.mark.parametrize("name", adamx.__all__)
def test_every_public_name_is_documented_with_an_example(name):
    documentation = inspect.getdoc(getattr(adamx, name)) or ""
    assert len(documentation.splitlines()[0]) > 20
    if name not in ("Adaptation", "Comparison", "Step", "Summary"):
        # these are what a documented function returns or hands in
        assert ">>> " in documentation, name


def test_every_public_name_is_in_the_reference_exactly_once():
    spec = importlib.util.spec_from_file_location("pages", ROOT / ".ci/pages.py")
    assert spec is not None and spec.loader is not None
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    found = collections.Counter[str]()
    for path, text in site.reference().items():
        for module, names in re.findall(r"^::: (.+)\n.*\n +members: \[(.*)\]$", text, re.MULTILINE):
            assert path == f"reference/{(module.split('.')[1:-1] or ['adamx'])[0]}.md"
            found.update(names.split(", "))
    assert found == collections.Counter(adamx.__all__)


CONCEPTS = [
    *(ROOT / "adamx/transforms").glob("[a-z]*.py"),
    *(ROOT / "adamx" / name for name in ("wrappers/master_weights.py", "storage/remainder.py")),
    *(ROOT / "adamx" / name for name in ("core/rounding.py", "storage/bfloat16.py")),
]


@pytest.mark.parametrize("path", sorted(CONCEPTS), ids=lambda path: path.stem)
def test_every_concept_opens_with_its_formula(path):
    opening = path.read_text().split('"""')[1]
    assert re.search(r"^    \S.* = ", opening, re.MULTILINE), path.name
