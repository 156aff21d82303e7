"""OpenStack Swift with its S3 API, on loopback: the S3 server that the tests run against."""
