"""Calibration of quantizers: text, statistics, estimators, recipes."""

from calib.calibration import calibrate, gather
from calib.fitting.dynamic import dynamic
from calib.fitting.fit import fit
from calib.recipe.recipe import Recipe, RecipeError, load_recipe, shipped_recipes
from calib.statistics.model_statistics import ModelStatistics
from calib.text.corpus import Corpus, CorpusError, load_corpus
from calib.text.windows import sample_windows, split_windows

__all__ = [
    "Corpus",
    "CorpusError",
    "ModelStatistics",
    "Recipe",
    "RecipeError",
    "calibrate",
    "dynamic",
    "fit",
    "gather",
    "load_corpus",
    "load_recipe",
    "sample_windows",
    "shipped_recipes",
    "split_windows",
]
