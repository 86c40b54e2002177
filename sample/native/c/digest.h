#ifndef DIGEST_H
#define DIGEST_H

#include <stddef.h>
#include <stdint.h>

uint64_t adler32(const uint8_t *bytes, size_t length);
uint64_t crc32(const uint8_t *bytes, size_t length);
uint64_t djb2(const uint8_t *bytes, size_t length);
uint64_t fletcher(const uint8_t *bytes, size_t length);
uint64_t fnv1a(const uint8_t *bytes, size_t length);
uint64_t jenkins(const uint8_t *bytes, size_t length);
uint64_t pearson(const uint8_t *bytes, size_t length);
uint64_t sdbm(const uint8_t *bytes, size_t length);

#endif
