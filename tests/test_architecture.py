"""The ownership rules of the design, each a search through the source."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "flexgen_triton"
LAYERS = (  # imports go down this list only, from the last to the first
    {
        "defaults",
        "demo",
        "environment",
        "flags",
        "interrupts",
        "kernels",
        "os_errors",
        "sizes",
        "stopping",
    },  # import nothing
    {"plan"},
    {"memory"},
    {"models"},
    {"sequences"},
    {"run"},
    {"machine"},
    {"arguments", "llm", "opt_config", "utils"},
    {"jobs"},
    {"commands"},
    {"__init__", "__main__", "apps", "bench", "flex_opt"},
)
SPEAKERS = {"commands", "apps", "environment", "flex_opt", "utils"}  # the last two by FlexGen's interface


def sources(*folders: str) -> list[Path]:
    found = [p for folder in folders for p in (PACKAGE / folder).rglob("*.py")]
    assert found
    return found


def imports(path: Path) -> set[str]:
    """Absolute dotted names of all that a file imports, anywhere in it."""
    package = (*path.relative_to(ROOT).parts[:-1],)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return names


def users(pattern: str, paths: list[Path]) -> set[str]:
    return {str(p.relative_to(PACKAGE)) for p in paths if re.search(pattern, p.read_text())}


def test_only_the_arena_allocates_large_buffers():
    """Elsewhere under memory/ and run/ nothing allocates but small index tensors and logits."""
    allocation = r"torch\.(zeros|full|rand\w*)\(|mmap\.mmap|pin_memory|cudaHostRegister|frombuffer"
    found = users(allocation, sources("memory", "run"))
    assert found <= {"memory/arena.py", "memory/disk_files.py", "memory/store.py", "memory/device.py"}
    assert users(r"torch\.empty\(", sources("memory", "run")) <= {
        "memory/arena.py",
        "memory/cache_places.py",  # a few counts of each sequence that the host attends to
        "memory/disk.py",  # rows gathered from a table
        "memory/store.py",
        "memory/scratch.py",  # prompts' temporaries
        "run/actions.py",  # an empty tensor
        "run/head.py",  # logits
    }


def test_only_lanes_and_disk_touch_threads_streams_and_events():
    pattern = r"import threading|import queue|concurrent\.futures|\bnew_stream\(|\brecord\("
    allowed = {
        "memory/lanes.py",
        "memory/disk.py",
        "memory/disk_files.py",  # a lock of each file, for pages that are changed in part
        "memory/device.py",
    }
    assert users(pattern, list(PACKAGE.rglob("*.py"))) <= allowed


def test_only_one_module_names_the_gpus_library():
    assert users(r"torch\.cuda|cudart", list(PACKAGE.rglob("*.py"))) == {"memory/device.py"}


def test_only_ops_imports_the_kernels():
    """All others may have the sizes, which import nothing."""
    found = {
        str(p.relative_to(PACKAGE)): {n for n in imports(p) if "flexgen_triton.kernels." in n} for p in sources("")
    }
    importers = {p for p, names in found.items() if any("kernels.sizes" not in n for n in names)}
    assert importers == {p for p in found if p.startswith("models/ops/") and p in importers} and importers


def test_only_the_table_of_families_imports_a_family():
    families = {"opt", "llama"}
    found = {p: {n.split(".")[-1] for n in imports(p) if n.startswith("flexgen_triton.models.")} for p in sources("")}
    assert {str(p.relative_to(PACKAGE)) for p, names in found.items() if names & families} == {"models/family.py"}


def test_plan_never_imports_torch():
    for path in sources("plan"):
        assert not {n for n in imports(path) if n.split(".")[0] in ("torch", "triton", "numpy", "transformers")}, path


def test_planning_starts_without_torch():
    import subprocess
    import sys

    code = "import sys, flexgen_triton.plan.plan, flexgen_triton.plan.fit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def layer(name: str) -> int:
    """The place in LAYERS of a module or folder of the package."""
    return next(n for n, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = layer(parts[0])
    inside = {n.split(".")[1] for n in imports(path) if n.startswith("flexgen_triton.")} - {parts[0]}
    names = {n for n in inside if any(n in names for names in LAYERS)}  # not what __init__ offers
    climbing = {n for n in names if layer(n) > own or (own == 0 and n)}
    assert not climbing, f"{path} imports {climbing}"


def loaded_by(path: Path) -> set[str]:
    """The package's modules that a module imports when it is itself imported, not in functions or for types alone."""
    tree = ast.parse(path.read_text())
    body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts[:-1]
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = (*base, *(node.module or "").split(".")) if node.module else base
            found |= {".".join(stem), *(".".join((*stem, alias.name)) for alias in node.names)}
    return found


def test_no_module_imports_itself_by_way_of_others():
    names = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PACKAGE.rglob("*.py")
    }
    needs = {name: (loaded_by(p) & names.keys()) - {name} for name, p in names.items() if p.name != "__init__.py"}
    while ready := {name for name, others in needs.items() if not others & needs.keys()}:
        needs = {name: others for name, others in needs.items() if name not in ready}
    assert not needs, "modules of circles, and those that need them"


def test_every_module_has_its_layer():
    found = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in PACKAGE.rglob("*.py")}
    assert found == set().union(*LAYERS)


def test_the_engine_does_not_import_transformers():
    importers = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if "transformers" in imports(p)}
    assert importers <= {"sequences/tokenizer.py"}


def test_only_commands_print_parse_arguments_or_read_the_environment():
    pattern = r"\bprint\(|sys\.argv|argparse|import click|import rich|from rich|os\.environ|getenv"
    found = {Path(p).with_suffix("").parts[0] for p in users(pattern, list(PACKAGE.rglob("*.py")))}
    assert found <= SPEAKERS


def test_there_is_no_mutable_module_state():
    """Names bound at module level to lists, sets or dicts are constants: upper case (or `__all__`)."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set):
                for target in node.targets:
                    assert isinstance(target, ast.Name), path
                    assert target.id == "__all__" or target.id.strip("_").isupper(), f"{path}: {target.id}"


def test_memory_never_asks_what_bytes_mean():
    assert not users(r"\b(attention|softmax|layer_norm|logits|token_id)\b\(", sources("memory"))


def test_the_kernels_folder_is_no_package_of_that_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
