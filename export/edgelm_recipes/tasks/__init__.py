"""The recipes, one module for each data set."""

from edgelm_recipes.tasks import chat, sentiment, similarity, summary, translation

RECIPES = {
    recipe.name: recipe
    for recipe in (
        sentiment.RECIPE,
        *translation.RECIPES,
        summary.RECIPE,
        similarity.RECIPE,
        chat.RECIPE,
    )
}
"""Every recipe by its name."""
