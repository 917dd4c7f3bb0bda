"""The operators that break guards: some of Cosmic Ray's, and six that it does not have."""

import re
from abc import abstractmethod
from collections.abc import Iterator

import cosmic_ray.plugins
from cosmic_ray.operators.operator import Operator
from parso.python.tree import Name
from parso.tree import NodeOrLeaf

from tests.mutation.sql import rewrites

CORE = re.compile(
    r"core/(ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is)"
    r"|ReplaceComparisonOperator_([LG]t_[LG]tE|[LG]tE_[LG]t)"
    r"|ReplaceBinaryOperator_(Add_Sub|Sub_Add)|ReplaceUnaryOperator_Delete_Not"
    r"|Replace(True|False|And|Or|Break|Continue)With\w+|AddNot|ZeroIterationForLoop)"
)


class _Rewrite(Operator):  # type: ignore[misc] # Cosmic Ray has no types
    """Puts other code where a node stands."""

    @abstractmethod
    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        """Each code that may stand there instead."""

    def mutation_positions(self, node: NodeOrLeaf) -> Iterator[tuple[object, object]]:
        for _code in self.codes(node):
            yield node.start_pos, node.end_pos

    def mutate(self, node: NodeOrLeaf, index: int) -> NodeOrLeaf:
        return Name(list(self.codes(node))[index], node.start_pos, node.get_first_leaf().prefix)

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class WeakenSQL(_Rewrite):
    """A string of SQL loses a condition, an assignment, an order, a limit or a lock."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if node.type not in {"string", "fstring"} or node.parent.type == "simple_stmt":
            return
        pieces = [node] if node.parent.type != "strings" else node.parent.children
        at = pieces.index(node)
        before, after = (
            "".join(_inside(piece)[1] for piece in some) for some in (pieces[:at], pieces[at + 1 :])
        )
        start, text, end = _inside(node)
        yield from (start + rewrite + end for rewrite in rewrites(before, text, after))


class DropStatement(_Rewrite):
    """A call whose value is not used, or an assignment to an attribute, is left out."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if node.parent is None or node.parent.type != "simple_stmt":
            return
        within = node.search_ancestor("funcdef")
        if within is None or within.name.value == "__init__":
            return
        is_call = node.type == "atom_expr" and node.children[-1].get_code().startswith("(")
        if is_call or (node.type == "expr_stmt" and node.children[0].type == "atom_expr"):
            yield "pass"


class KeepAll(_Rewrite):
    """A comprehension's condition passes everything."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        if node.type == "comp_if":
            yield "if True"


class CatchNothing(_Rewrite):
    """An except clause catches nothing (Cosmic Ray's own operator fails on dotted names)."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        clause = node.parent
        if clause is not None and clause.type == "except_clause" and clause.children[1] is node:
            yield "()"


class SwapMembership(_Rewrite):
    """`in` becomes `not in`, and the other way round."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        code = node.get_code(include_prefix=False)
        if code == "in" and node.parent.type == "comparison":
            yield "not in"
        elif node.type == "comp_op" and code == "not in":
            yield "in"


class SwapMinAndMax(_Rewrite):
    """A lower bound becomes an upper one, and the other way round."""

    def codes(self, node: NodeOrLeaf) -> Iterator[str]:
        is_call = node.type == "name" and node.get_next_leaf().value == "("
        if is_call and node.parent.type == "atom_expr" and node.value in {"min", "max"}:
            yield {"min": "max", "max": "min"}[node.value]


def _inside(piece: NodeOrLeaf) -> tuple[str, str, str]:
    """A literal's opening, its text and its closing."""
    code = piece.get_code(include_prefix=False)
    quote = next(q for q in ('"""', "'''", '"', "'") if code.endswith(q))
    start = code.index(quote) + len(quote)
    return code[:start], code[start : -len(quote)], quote


OURS = (WeakenSQL, DropStatement, CatchNothing, KeepAll, SwapMembership, SwapMinAndMax)
NAMES = [name for name in cosmic_ray.plugins.operator_names() if CORE.fullmatch(name)]
NAMES += [f"guards/{operator.__name__}" for operator in OURS]
# Cosmic Ray looks for plug-ins among installed packages, and this project is not one.
cosmic_ray.plugins.OPERATOR_PROVIDERS["guards"] = {each.__name__: each for each in OURS}
