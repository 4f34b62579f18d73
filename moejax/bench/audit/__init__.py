"""The reference study's experiment done again, and every claim beside what came out."""

from ._audit import audit_rows as audit_rows
from ._audit import describe_study as describe_study
from ._audit import real_view as real_view
from ._audit import run_audit as run_audit
from ._audit import study_views as study_views
from ._facts import NAMED_MODEL as NAMED_MODEL
from ._facts import SWITCH_MODEL as SWITCH_MODEL
from ._study import BASELINE as BASELINE
from ._study import STUDY_HARDWARE as STUDY_HARDWARE
from ._study import STUDY_MODEL as STUDY_MODEL
from ._study import STUDY_WORKLOAD as STUDY_WORKLOAD
from ._study import StudySlots as StudySlots
from ._study import by_run as by_run
from ._study import run_study as run_study
from ._study import slots_of_study as slots_of_study
from ._study import study_settings as study_settings
