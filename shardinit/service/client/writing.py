"""Writing: a client has the service write a checkpoint, and watches it.

A watch that breaks is taken up again: the write goes on, or goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardinit.errors import ServiceError
from shardinit.progress import Report
from shardinit.service.client.connection import Connection
from shardinit.service.client.retrying import attempts
from shardinit.v1 import service_pb2
from shardinit.verify.receipt_record import Receipt

FORMATS = {
    "safetensors": service_pb2.CHECKPOINT_FORMAT_SAFETENSORS,
    "orbax": service_pb2.CHECKPOINT_FORMAT_ORBAX,
}


@dataclass(frozen=True)
class Written:
    """A checkpoint that a service has written.

    Attributes:
      uri: where it is.
      receipt_json: its receipt as JSON.
    """

    uri: str
    receipt_json: str

    @property
    def receipt(self) -> Receipt:
        """The receipt; ``shardinit.verify_receipt`` holds arrays against it."""
        return Receipt.from_json(self.receipt_json)


def write(
    connection: Connection,
    request: service_pb2.WriteCheckpointRequest,
    report: Report,
) -> Written:
    """Returns when the checkpoint is complete.

    Raises:
      SpecError: the service finds faults in the request.
      ServiceError: it was not written.
    """
    done, receipt = 0, service_pb2.CheckpointReceipt()
    attempted = attempts(("UNAVAILABLE",), lambda: (done,))
    for attempt in attempted:
        with (
            attempt,
            connection.stream("WriteCheckpoint", request, endless=True) as answers,
        ):
            for answer in answers:
                receipt = answer.receipt
                if answer.WhichOneof("part") == "progress":
                    done = answer.progress.bytes_done
                    report(done, answer.progress.bytes_total)
    if receipt.receipt_json:
        return Written(receipt.uri, receipt.receipt_json)
    where = f"WriteCheckpoint from {connection.target}"
    raise ServiceError(where, "the stream has no receipt", code="DATA_LOSS")
