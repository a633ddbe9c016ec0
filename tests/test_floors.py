"""Who may import whom, and how long a function may be; read from the sources; and what an import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("amc_env", "agents", "search")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LONGEST = 45  # lines of a function, its docstring left out
FLOORS = (
    (
        "amc_env.errors",
        "amc_env.files",
        "amc_env.inputs",
        "amc_env.validation",
        "amc_env.system",
        "amc_env.rewards",
        "amc_env.tasks",
    ),
    ("amc_env.space", "amc_env.graph", "amc_env.onnx", "amc_env.mobile"),
    ("amc_env.encoding",),
    ("amc_env.pruning",),
    ("amc_env.costs", "amc_env.evaluation"),
    ("amc_env.env", "amc_env.testing"),
)
"""Lowest first. A module imports only from its own floor or below; so it is for the folders of search/."""
SEARCH_FLOORS = (
    ("search.files", "search.huggingface", "search.interrupts", "search.settings", "search.output"),
    ("search.data",),
    ("search.training",),
    ("search.models", "search.study"),
    ("search.config",),
    ("search.api", "search.job", "search.run_latency", "search.run_sensitivity"),
    ("search.run_search", "search.run_apply", "search.run_report", "search"),
)

ONLY_HERE = {
    "ai_edge_litert": "amc_env/mobile.py",
    "executorch": "amc_env/mobile.py",
    "litert_torch": "amc_env/mobile.py",
    "onnxruntime": "amc_env/onnx.py",
    "vl_convert": "search/output/charts.py",
    "ray": "amc_env/evaluation/on_ray.py",
    "transformers": "search/huggingface.py",
    "timm": "search/models/timm_models.py",
    "torchvision": "search/models/torchvision_models.py",
    "hydra": "search/",
    "omegaconf": "search/",
    "wandb": "search/",
}
"""Dependencies with one home in the product."""


def module_name(path: Path) -> str:
    """The dotted name of a file of the repository."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(name: str) -> int | None:
    """The number of a module's floor within its package; None for what has none."""
    for number, modules in enumerate(SEARCH_FLOORS if name.startswith("search") else FLOORS):
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            return number
    return None


def imports(path: Path) -> set[str]:
    """Absolute names that a file imports, anywhere in it; `from a import b` counts as a.b and a."""
    found: set[str] = set()
    stack: list[ast.AST] = [ast.parse(path.read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
        stack.extend(ast.iter_child_nodes(node))
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def files_of(package: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(ROOT).parts[0] == package]


@pytest.mark.parametrize(
    "path", [*files_of("amc_env"), *files_of("search")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_floors_are_imported_downwards(path: Path) -> None:
    name = module_name(path)
    own, package = floor(name), name.split(".")[0]
    if name == "amc_env":
        assert not roots(path) & set(PACKAGES)
        return
    assert own is not None, f"{name} stands on no floor"
    ours = {x for x in imports(path) if x.startswith(f"{package}.")}
    upwards = {x for x in ours if (floor(x) or 0) > own}
    assert not upwards, f"{name} imports {upwards} from above"


def test_only_the_search_sees_everything() -> None:
    for path in files_of("amc_env"):
        assert not roots(path) & {"agents", "search", "conf"}, path
    for path in files_of("agents"):
        assert not roots(path) & {"search", "conf"}, path
        if path.stem not in ("testing", "toy"):  # the toy search has the real environment
            ours = {x for x in imports(path) if x.startswith("amc_env.") and x.count(".") == 1}
            assert ours <= {"amc_env.errors", "amc_env.space", "amc_env.validation"}, path


def test_agents_need_little() -> None:
    allowed = {"agents", "amc_env", "numpy", "torch", "gymnasium", "stable_baselines3", "pydantic", "sklearn"}
    allowed |= {"safetensors"}  # trained policies
    for path in files_of("agents"):
        third = {x for x in roots(path) if x not in sys.stdlib_module_names}
        assert third <= allowed, path


@pytest.mark.parametrize("package", ONLY_HERE)
def test_a_dependency_has_one_home(package: str) -> None:
    users = [path.relative_to(ROOT).as_posix() for path in FILES if package in roots(path)]
    assert users
    assert all(user.startswith(ONLY_HERE[package]) for user in users), users


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring left out."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_are_short(path: Path) -> None:
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert {f.name: length(f) for f in functions if length(f) > LONGEST} == {}


@pytest.mark.parametrize(
    ("code", "without"),
    [
        ("import search", ["torch", "hydra"]),
        ("import search.run_search", ["torch", "pydantic"]),
        (
            "from search import compress, load_pruned, make_env",
            ["matplotlib", "scipy.stats", "scipy.optimize", "stable_baselines3", "wandb", "hydra"],
        ),
    ],
)
def test_what_is_slow_to_import_is_imported_when_it_is_needed(code: str, without: list[str]) -> None:
    found = f"import sys; print(*[name for name in {without!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", f"{code}; {found}"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.split()) == (0, []), ended.stderr
