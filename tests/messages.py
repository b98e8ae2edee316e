"""Every message that the package can show, as its source has it: for the troubleshooting part of docs/OPERATIONS.md.

Holes (names, numbers) are "..."; what the class or the command line adds to a text is added here, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import s3blockfs
from s3blockfs import errors, s3store

#: Of the calls, what is shown to nobody: errors of programmers, errnos without a text, control flow.
_OURS = {name for name, kind in vars(errors).items() if isinstance(kind, type)} | {"Stale", "OSError"}
_SHOWN = _OURS | {"BadParameter", "UsageError", "_match", "complain", "warning", "error", "exception", "address_of"}
_VARIABLES = {"text", "said", "advice", "wrong", "found", "why", "missing", "WHAT_TO_DO"}
_HELP = "...; see `s3blockfs ... --help`"
_DAMAGED = str(errors.DamagedObject("..."))[3:]


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values)
    return None


def _of_call(call: ast.Call) -> str | None:
    name = ast.unparse(call.func).rpartition(".")[2]
    texts = [text for text in map(_text, call.args) if text is not None and " " in text]
    if name == "append" and ast.unparse(call.func) == "found.append":
        return texts[0] if texts else None
    if name not in _SHOWN or not texts:
        return None
    if name in ("BadParameter", "_match") or ast.unparse(call.func) == "click.UsageError":
        return texts[0] + _HELP
    return texts[0].replace("%s", "...").replace("%r", "...") + (_DAMAGED if name == "DamagedObject" else "")


def _texts(node: ast.AST) -> Iterator[str]:
    """Whole texts below a node, not the pieces of one."""
    if isinstance(node, (ast.Constant, ast.JoinedStr)):
        text = _text(node)
        yield from [text] if text else []
    else:
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)


def _in(tree: ast.AST) -> Iterator[str | None]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield _of_call(node)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in _VARIABLES:
            yield from _texts(node.value)
        elif isinstance(node, (ast.Yield, ast.Return)) and node.value is not None:  # findings of `doctor`
            yield from (text for text in _texts(node.value) if text.startswith("FIX"))


def all_messages() -> set[str]:
    """Without backticks. Frames of two words and less ("...: ...") say nothing by themselves."""
    found: set[str | None] = {text for _, text in s3store._MEANINGS.values()}
    for file in Path(s3blockfs.__file__).parent.rglob("*.py"):
        found.update(_in(ast.parse(file.read_text())))
    plain = {text.replace("`", "") for text in found if text}
    return {text for text in plain if " " in text and sum(c.isalpha() for c in text.replace("FIX", "")) >= 5}


if __name__ == "__main__":
    print("\n".join(sorted(all_messages())))
