"""Files on disk become checked facts: the manifest, the certificate, the reference, and the folder that holds them."""
