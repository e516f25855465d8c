"""The picture of imports: arrows point one way, and a package's files do not go through its `__init__`."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ORDER = ("kernels", "models", "eviction", "caches", "generation", "planning", "pod", "evaluate", "commands")
"""Each imports itself and those before it."""
MODULES = [
    (f"restkv_jax.{name}", path)
    for name in ORDER
    for path in sorted((ROOT / "restkv_jax" / name).resolve().rglob("*.py"))
]


def imports(path):
    """Modules that a file imports from the package, with the names that it takes from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "restkv_jax":
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names if alias.name.split(".")[0] == "restkv_jax")


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda x: x.name if isinstance(x, pathlib.Path) else x)
def test_imports_point_one_way(package, path):
    rank = ORDER.index(package.split(".")[1])
    for module, _ in imports(path):
        parts = module.split(".")
        if len(parts) > 1 and parts[1] in ORDER:
            assert ORDER.index(parts[1]) <= rank, f"{path.name} imports {module}"


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda x: x.name if isinstance(x, pathlib.Path) else x)
def test_files_do_not_import_their_own_package(package, path):
    if path.name != "__init__.py":
        assert package not in {module for module, _ in imports(path)}
        assert "restkv_jax" not in {module for module, _ in imports(path)}


@pytest.mark.parametrize(("package", "path"), MODULES, ids=lambda x: x.name if isinstance(x, pathlib.Path) else x)
def test_no_function_has_the_name_of_its_module(package, path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    # a preset gives its file its name; their package exports none, so that the file stays what is imported
    assert (
        path.stem not in {node.name for node in body if isinstance(node, ast.FunctionDef)}
        or path.parent.name == "methods"
    )
