"""The manifests in k8s/: against schemas, against the configuration, against each other."""
