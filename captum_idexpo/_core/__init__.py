"""The ground floor: one room for each question that every other part of the package asks."""
