"""Every error that backsolve raises, and the words of each: one file a subject.

A message is a small document: the call it is about, what was expected, what came, and what to do about it.
"""

from backsolve.errors.arguments import *
from backsolve.errors.claims import *
from backsolve.errors.closures import *
from backsolve.errors.exceptions import *
from backsolve.errors.jacobians import *
from backsolve.errors.layout import *
from backsolve.errors.returned import *
from backsolve.errors.transforms import *
