"""The Redis door for ETL: streams documents into collections, and asks the fleet."""

from vecfleet.common.document import Document
from vecfleet.producer.fields import FieldMap
from vecfleet.producer.items import Rejected
from vecfleet.producer.options import SubmitOptions
from vecfleet.producer.producer import AsyncProducer
from vecfleet.producer.readers import read_documents
from vecfleet.producer.result import Progress, SubmissionResult
from vecfleet.producer.sync_producer import Producer

__all__ = [
    "AsyncProducer",
    "Document",
    "FieldMap",
    "Producer",
    "Progress",
    "Rejected",
    "SubmissionResult",
    "SubmitOptions",
    "read_documents",
]
