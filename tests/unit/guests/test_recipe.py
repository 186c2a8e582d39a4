"""What an image is made of."""

import pytest

from offmap.errors import OffmapError
from offmap.guests.recipe import RootRecipe


def test_the_same_recipe_has_the_same_key_and_another_has_another() -> None:
    plain = RootRecipe()
    assert plain.key == RootRecipe().key
    assert plain.key.startswith("bookworm-")
    assert RootRecipe(include=("curl", "gcc")).key == RootRecipe(include=("gcc", "curl", "gcc")).key
    others = [
        RootRecipe(release="trixie"),
        RootRecipe(include=("curl",)),
        RootRecipe(size=1 << 30),
        RootRecipe(autologin=True),
        RootRecipe(hostname="job"),
    ]
    assert len({plain.key, *(recipe.key for recipe in others)}) == 6


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"release": "book worm"}, "names no Debian release"),
        ({"release": "../x"}, "names no Debian release"),
        ({"include": ("curl", "--option")}, "'--option' is no package name"),
        ({"include": ("curl;reboot",)}, "is no package name"),
        ({"hostname": "-a"}, "is no host name"),
        ({"size": 1 << 20}, "cannot have 1 MiB"),
        ({"size": (1 << 30) + 1}, "whole MiB"),
    ],
)
def test_what_debian_could_not_have_is_refused(facts: dict[str, object], message: str) -> None:
    with pytest.raises(OffmapError, match=message):
        RootRecipe(**facts)  # type: ignore[arg-type]
