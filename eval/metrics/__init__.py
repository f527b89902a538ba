"""``evaluate.Metric`` modules, one folder each, loadable offline from where the package lies."""
