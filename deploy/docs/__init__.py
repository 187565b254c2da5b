"""The documentation site: pages, and what makes their pictures and tables. ``make docs`` builds it."""
