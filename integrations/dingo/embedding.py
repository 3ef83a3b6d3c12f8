r"""What dingo's wrapper makes of its contexts before the flow gets them."""

__all__ = ["contexts", "embedded"]

from typing import Any


def contexts(context: Any) -> tuple[Any, ...]:
    r"""Returns the contexts that the wrapper is called with: one, several, or none.

    Arguments:
        context: A tensor, a tuple or list of them, or :py:`None`.
    """
    if context is None:
        return ()
    return tuple(context) if isinstance(context, list | tuple) else (context,)


def embedded(model: Any, context: Any) -> Any:
    r"""Returns the context of the flow.

    Arguments:
        model: The wrapper.
        context: A tensor, a tuple or list of them, or :py:`None`.
    """
    x = contexts(context)
    if not x:
        return None
    return x if model.embedding_net is None else model.embedding_net(*x)
