"""Figures of evaluations as pytest.approx takes them."""


def level(figures: dict) -> dict:
    """One number a key, also where an evaluation has several: `accepted` of 1, 2, ... drafted tokens."""
    found = {}
    for name, value in figures.items():
        found.update({f"{name}.{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value})
    return found
