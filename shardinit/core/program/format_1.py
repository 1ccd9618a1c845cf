"""Format 1 of program files, read as if it were format 2.

It did not say what a function makes, nor why in words for programs, nor did it tie a
module to its record. A table was known by the sentence that stood in for its reason.
"""

from __future__ import annotations

import hashlib

from shardinit.core.window.reasons import Reason
from shardinit.v1 import program_pb2 as pb

_TABLE = "a table of constants"


def upgrade(content: pb.InitProgramContent) -> pb.InitProgramContent:
    """A copy of a content of format 1 with what format 2 says besides.

    Raises:
      ValueError: a function is neither windowed nor says why it is not.
    """
    upgraded = pb.InitProgramContent()
    upgraded.CopyFrom(content)
    for function in upgraded.functions:
        if function.windowed == bool(function.whole):
            raise ValueError("a function that is neither windowed nor replicated")
        function.module_sha256 = hashlib.sha256(function.module).digest()
        if function.windowed:
            function.kind = pb.Function.KIND_WINDOWED
        elif function.whole == _TABLE:
            function.kind = pb.Function.KIND_TABLE
            function.whole = ""
        else:
            function.kind = pb.Function.KIND_REPLICATED
            function.reason = Reason.UNKNOWN.value
    return upgraded
