"""Reading the slots of a state in any storage.

decoded(concept, slots) = the children's `decode` of the concept's own `decode` of the slots
encoded(concept, slots) = the concept's own `encode` of the children's `encode` of the slots
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from adamx.core import errors
from adamx.core.concept import Concept, Slots
from adamx.core.leaves import Leaves
from adamx.core.paths import flatten
from adamx.core.shard import WHOLE
from adamx.core.stacked import of_layers
from adamx.core.transformation import Transformation
from adamx.storage import masters
from adamx.storage.storage import Storage


def decoded(concept: Concept, slots: Slots) -> Slots:
    """Return one leaf's slots as the formula sees them, from the stored slots."""
    if isinstance(concept, of_layers):
        return concept.each(decoded, concept.slot_names(), slots)
    if isinstance(concept, Storage) and slots:
        slots = concept.decoded(slots)
    for child in concept.children:
        slots = decoded(child, slots)
    return slots


def encoded(concept: Concept, slots: Slots) -> Slots:
    """Return one leaf's stored slots, from the slots as the formula sees them."""
    if isinstance(concept, of_layers):
        return concept.each(encoded, without_storages(concept).slot_names(), slots)
    for child in concept.children:
        slots = encoded(child, slots)
    if isinstance(concept, Storage) and slots:
        names = concept.inner.slot_names()
        others = {name: x for name, x in slots.items() if name not in names}
        slots = others | concept.encoded({n: slots[n] for n in names if n in slots})
    return slots


def without_storages(tx: Any) -> Any:
    """Return the transformation with each storage replaced by the concept inside it."""
    if isinstance(tx, Storage):
        return without_storages(tx.inner)
    return tx.with_children([without_storages(child) for child in tx.children])


def moments(state: Mapping[str, Any], tx: Transformation) -> dict[str, Any]:
    """Return the slots of a state as the formula sees them, for logging, plots and conversion.

    Args:
        state: a state of `tx`.
        tx: the transformation that made it.

    Returns:
        For each slot, such as `mu` and `nu`, a tree shaped like the parameters: float32, or wider
        for a wider parameter. Slots that are not packed are the state's own arrays. The entries of
        Optax's stages and of `master_weights` are left out.

    Raises:
        TypeError: if `state` is not a state of adamx.
        ValueError: if the state does not have the slots of `tx`.

    Example:
        >>> import adamx, jax.numpy as jnp
        >>> tx = adamx.adam(0.1, b1=0.5, moments="packed16")
        >>> _, state = tx.update({"w": jnp.array([4.0])}, tx.init({"w": jnp.zeros(1)}))
        >>> sorted(state), moments(state, tx)["mu"]
        (['count', 'learning_rate', 'packed16'], {'w': Array([2.], dtype=float32)})
    """
    errors.check_state(state, "moments(state, tx)")
    names = tx.tree_names()
    if not names:
        return {}
    paths, _, treedef = flatten(errors.entry(state, names[0]))
    none = [None] * len(paths)
    columns = [treedef.flatten_up_to(errors.entry(state, name)) for name in names]
    like = [_largest(slots) for slots in zip(*columns, strict=True)]
    leaves = Leaves(paths, like, None, none, none, treedef, [WHOLE] * len(paths))
    found = decoded_slots(tx.for_tree(leaves.tree(like)), leaves, state)
    return {name: leaves.tree(x) for name, x in found.items() if name not in masters.NAMES}


def decoded_slots(tx: Any, leaves: Leaves, state: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the slots of a state as the formula sees them, in lists parallel to the leaves."""
    names = tx.tree_names()
    columns = [leaves.treedef.flatten_up_to(errors.entry(state, name)) for name in names]
    seen = without_storages(tx).tree_names()
    found: dict[str, list[Any]] = {name: [None] * len(leaves.paths) for name in seen}
    for i, (path, like) in enumerate(zip(leaves.paths, leaves.whole(), strict=True)):
        if like is not None:
            slots = {n: x[i] for n, x in zip(names, columns, strict=True) if x[i] is not None}
            for name, x in decoded(tx.for_leaf(path, like), slots).items():
                found[name][i] = x
    return found


def slot_of_kind(kind: str, names: Iterable[str]) -> str | None:
    """Return the first name that is a kind, such as "nu", or that goes on after it; or None.

    Example:
        >>> slot_of_kind("nu", ("mu", "nu_seeded")), slot_of_kind("nu", ("mu", "trace"))
        ('nu_seeded', None)
    """
    return next((name for name in names if name == kind or name.startswith(f"{kind}_")), None)


def _largest(slots: tuple[Any, ...]) -> Any:
    """Return a leaf's largest slot, which is most like its parameter."""
    return max((x for x in slots if x is not None), key=lambda x: (x.ndim, x.size), default=None)
