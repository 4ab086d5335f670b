"""From records to one self-contained page. Only records and their artifacts are read, never a model."""

from .page import write_report as write_report
from .summary import accuracy_statement as accuracy_statement
from .summary import difference_statement as difference_statement
from .summary import summary_rows as summary_rows
