"""What checks core's annotations: beartype, which takes an int for a float."""

import random

# It looks at one item of a container, which it draws from Python's random state: a
# function that is checked would seem to draw its weights from there.
_getrandbits, random.getrandbits = random.getrandbits, random.Random(0).getrandbits
try:
    from beartype import BeartypeConf, beartype

    check = beartype(conf=BeartypeConf(is_pep484_tower=True))

    @check
    def _whole(items: list[int]) -> None:
        """Checked while it imports what draws."""

finally:
    random.getrandbits = _getrandbits
