"""The studies of the reproduction: recipes, one way from recipe to record, analyses, and tables made from records alone."""

from .recipes import RECIPES, STUDIES, find_recipe, make_plan, study_of
from .records import PROFILES, Identity, Record, find_records, read_record, runs_folder, write_findings, write_record
from .running import plan_of, run, tasks_of, train, trained
from .study import Plan, Recipe, Study, Tasks

__all__ = [
    "PROFILES",
    "RECIPES",
    "STUDIES",
    "Identity",
    "Plan",
    "Recipe",
    "Record",
    "Study",
    "Tasks",
    "find_recipe",
    "find_records",
    "make_plan",
    "plan_of",
    "read_record",
    "run",
    "runs_folder",
    "study_of",
    "tasks_of",
    "train",
    "trained",
    "write_findings",
    "write_record",
]
