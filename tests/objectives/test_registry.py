import pytest

from hybrid_ssl.objectives import OBJECTIVES, objective_class
from hybrid_ssl.objectives.base import Objective
from hybrid_ssl.objectives.mae import MAE


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_name_leads_to_an_objective_with_settings(name: str) -> None:
    kind = objective_class(name)
    assert issubclass(kind, Objective) and kind.Config(name=name).name == name


def test_own_objectives_are_named_by_module_and_class() -> None:
    assert objective_class("hybrid_ssl.objectives.mae:MAE") is MAE


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("simim", "no objective named 'simim'; did you mean simmim?"),
        ("nothing like it", "there are: mae, simmim"),
        ("no_such_package:MAE", "'no_such_package:MAE' cannot be imported: No module named"),
        ("hybrid_ssl.objectives.mae:Mae", "cannot be imported: .*has no attribute 'Mae'"),
        ("hybrid_ssl.plan:Batch", "is no subclass of hybrid_ssl.objectives.base.Objective"),
    ],
)
def test_a_wrong_name_says_what_is_allowed(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective_class(name)
