"""Recipes: functions that return a complete, frozen run description. A variant is dataclasses.replace of one."""
