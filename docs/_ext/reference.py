"""Sphinx extension for the pages of the API: which members of a class they show, and how names in docstrings find them."""

from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

_ELSEWHERE = {
    "Axes": "matplotlib.axes.Axes",
    "Figure": "matplotlib.figure.Figure",
    "HMC": "pyro.infer.mcmc.HMC",
    "Tensor": "torch.Tensor",
    "matplotlib.axes._axes.Axes": "matplotlib.axes.Axes",
    "nn.Module": "torch.nn.Module",
}
"""Full names of what other packages document."""


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Find an object by the end of its name, where there is one of that name."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if target in _ELSEWHERE:
        node["reftarget"] = _ELSEWHERE[target]  # for intersphinx, which comes next
        return None
    objects = env.domains.python_domain.objects
    # a class that a page documents as pyro_gs.X is known to annotations by its module, and methods by their class
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        ending = "." + ".".join(parts[-length:])
        found = sorted(name for name in objects if name.endswith(ending))
        if len(found) == 1:
            entry = objects[found[0]]
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, found[0])
        if target.partition(".")[0] != "pyro_gs":
            break
    return None


def _skip(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: Any) -> bool | None:
    """Leave out members that a class has from another package, which documents them."""
    function = getattr(member, "fget", None) or getattr(member, "func", None) or member
    function = getattr(function, "__func__", function)
    module = getattr(function, "__module__", None) or getattr(getattr(function, "__objclass__", None), "__module__", None)
    return True if isinstance(module, str) and not module.startswith("pyro_gs") else None


def setup(app: Sphinx) -> dict[str, Any]:
    """For Sphinx."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("missing-reference", _resolve, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
