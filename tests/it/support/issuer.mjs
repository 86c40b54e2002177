// Signs runtime tokens as GitHub does, with a key made for this run.
//
// usage: node issuer.mjs CLAIMS_IN_JSON...
//
// Prints {"jwks": the public key, "tokens": one for each claims}.
import { createSign, generateKeyPairSync } from 'node:crypto';

const { publicKey, privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
const encode = (value) => Buffer.from(JSON.stringify(value)).toString('base64url');
const tokens = process.argv.slice(2).map((claims) => {
  const signed = `${encode({ alg: 'RS256', typ: 'JWT', kid: 'key' })}.${encode(JSON.parse(claims))}`;
  const signature = createSign('RSA-SHA256').update(signed).sign(privateKey, 'base64url');
  return `${signed}.${signature}`;
});
const key = { ...publicKey.export({ format: 'jwk' }), alg: 'RS256', use: 'sig', kid: 'key' };
console.log(JSON.stringify({ jwks: { keys: [key] }, tokens }));
