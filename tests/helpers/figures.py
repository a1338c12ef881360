"""Figures of evaluations as pytest.approx takes them."""


def level(figures: dict) -> dict:
    """One number a key, also where an evaluation has several: `accepted` of 1, 2, ... drafted tokens, and `sources`.
    What a task does not have, such as classes, is left out, so that one side alone having it tells."""
    found = {}
    for name, value in figures.items():
        if value is None:
            continue
        inside = dict(enumerate(value)) if isinstance(value, list) else value
        several = isinstance(inside, dict)
        found.update({f"{name}.{key}": one for key, one in level(inside).items()} if several else {name: value})
    return found
