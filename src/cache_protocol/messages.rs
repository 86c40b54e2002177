//! The messages of both versions, for servers and clients.
//!
//! Version 2's are those of `results/api/v1/cache.proto` in GitHub's toolkit and in the crate
//! `ghac`, in protobuf or in its JSON; field 1 of each request, the metadata, is for GitHub's own
//! use and left out. Version 1's are those of `@actions/cache` 4 (`contracts.d.ts`) and of
//! opendal's service `ghac`, in JSON.

/// Version 2: Twirp.
pub mod v2 {
    use prost::Message;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// The service's name in a request's path, `twirp/SERVICE/METHOD`.
    pub const SERVICE: &str = "github.actions.results.api.v1.CacheService";

    /// The method that looks an entry up: [`GetRequest`], [`GetResponse`].
    pub const GET: &str = "GetCacheEntryDownloadURL";
    /// The method that reserves a key: [`CreateRequest`], [`CreateResponse`].
    pub const CREATE: &str = "CreateCacheEntry";
    /// The method that commits an upload: [`FinalizeRequest`], [`FinalizeResponse`].
    pub const FINALIZE: &str = "FinalizeCacheEntryUpload";

    /// Which key to reserve.
    #[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
    #[serde(default)]
    pub struct CreateRequest {
        /// The key.
        #[prost(string, tag = "2")]
        pub key: String,
        /// The version, which tells entries of one key apart.
        #[prost(string, tag = "3")]
        pub version: String,
    }

    /// The address for the content.
    #[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
    #[serde(default)]
    pub struct CreateResponse {
        /// Whether the key is reserved.
        #[prost(bool, tag = "1")]
        pub ok: bool,
        /// The URL for the content.
        #[prost(string, tag = "2")]
        #[serde(alias = "signedUploadUrl")]
        pub signed_upload_url: String,
        /// Why it is not reserved.
        #[prost(string, tag = "3")]
        #[serde(skip_serializing_if = "String::is_empty")]
        pub message: String,
    }

    /// Which upload to commit.
    #[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
    #[serde(default)]
    pub struct FinalizeRequest {
        /// The key.
        #[prost(string, tag = "2")]
        pub key: String,
        /// The content's size in bytes.
        #[prost(int64, tag = "3")]
        #[serde(
            alias = "sizeBytes",
            serialize_with = "as_text",
            deserialize_with = "number_or_text"
        )]
        pub size_bytes: i64,
        /// The version.
        #[prost(string, tag = "4")]
        pub version: String,
    }

    /// The entry.
    #[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
    #[serde(default)]
    pub struct FinalizeResponse {
        /// Whether the upload is an entry now.
        #[prost(bool, tag = "1")]
        pub ok: bool,
        /// The entry's number.
        #[prost(int64, tag = "2")]
        #[serde(
            alias = "entryId",
            serialize_with = "as_text",
            deserialize_with = "number_if_any"
        )]
        pub entry_id: i64,
        /// Why it is not.
        #[prost(string, tag = "3")]
        #[serde(skip_serializing_if = "String::is_empty")]
        pub message: String,
    }

    /// Which entry to look for.
    #[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
    #[serde(default)]
    pub struct GetRequest {
        /// The key.
        #[prost(string, tag = "2")]
        pub key: String,
        /// Prefixes of other acceptable keys, best first. Twirp's JSON has no field for an empty
        /// list.
        #[prost(string, repeated, tag = "3")]
        #[serde(alias = "restoreKeys", skip_serializing_if = "Vec::is_empty")]
        pub restore_keys: Vec<String>,
        /// The version.
        #[prost(string, tag = "4")]
        pub version: String,
    }

    /// The address of the content.
    #[derive(Clone, PartialEq, Message, Serialize, Deserialize)]
    #[serde(default)]
    pub struct GetResponse {
        /// Whether there is such an entry.
        #[prost(bool, tag = "1")]
        pub ok: bool,
        /// The URL of the content.
        #[prost(string, tag = "2")]
        #[serde(alias = "signedDownloadUrl")]
        pub signed_download_url: String,
        /// The key that was found.
        #[prost(string, tag = "3")]
        #[serde(alias = "matchedKey")]
        pub matched_key: String,
    }

    /// Protobuf's JSON writes 64-bit numbers as text, and reads both.
    fn number_or_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum NumberOrText {
            Number(i64),
            Text(String),
        }
        match NumberOrText::deserialize(deserializer)? {
            NumberOrText::Number(number) => Ok(number),
            NumberOrText::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }

    /// The same, or 0: no client uses the number of an entry.
    fn number_if_any<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
        let value = serde_json::Value::deserialize(deserializer)?;
        let text = value.as_str().and_then(|text| text.parse().ok());
        Ok(value.as_i64().or(text).unwrap_or(0))
    }

    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde passes fields by reference"
    )]
    fn as_text<S: Serializer>(number: &i64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_size_is_read_as_number_and_as_text_under_both_names() {
            for json in [
                r#"{"key":"k","size_bytes":"7","version":"v"}"#,
                r#"{"key":"k","sizeBytes":7,"version":"v","metadata":{"x":1}}"#,
            ] {
                let request: FinalizeRequest = serde_json::from_str(json).unwrap();
                assert_eq!((request.size_bytes, request.key.as_str()), (7, "k"));
            }
        }

        #[test]
        fn protobuf_messages_have_the_fields_of_the_protocol() {
            // key = 2, size_bytes = 3, version = 4, behind an unknown metadata = 1.
            let bytes = b"\x0a\x02\x08\x01\x12\x01k\x18\x07\x22\x01v";
            let request = FinalizeRequest::decode(&bytes[..]).unwrap();
            assert_eq!(
                request,
                FinalizeRequest {
                    key: "k".to_owned(),
                    size_bytes: 7,
                    version: "v".to_owned()
                }
            );
            let answer = GetResponse {
                ok: true,
                signed_download_url: "u".to_owned(),
                matched_key: "k".to_owned(),
            };
            assert_eq!(answer.encode_to_vec(), b"\x08\x01\x12\x01u\x1a\x01k");
        }

        #[test]
        fn a_request_in_json_has_sizes_as_text_and_no_empty_list() {
            let request = FinalizeRequest {
                key: "k".to_owned(),
                size_bytes: 7,
                version: "v".to_owned(),
            };
            let json = serde_json::to_string(&request).unwrap();
            assert_eq!(json, r#"{"key":"k","size_bytes":"7","version":"v"}"#);
            let request = GetRequest {
                key: "k".to_owned(),
                version: "v".to_owned(),
                ..GetRequest::default()
            };
            let json = serde_json::to_string(&request).unwrap();
            assert_eq!(json, r#"{"key":"k","version":"v"}"#);
        }
    }
}

/// Version 1: REST.
pub mod v1 {
    use serde::{Deserialize, Serialize};

    /// The path of the API, below the service's URL.
    pub const PATH: &str = "_apis/artifactcache";

    /// The query of a look-up, `GET PATH/cache?keys=…&version=…`.
    #[derive(Debug, Default, Serialize, Deserialize)]
    #[serde(default)]
    pub struct FindQuery {
        /// The key and prefixes of other acceptable keys, separated by commas.
        pub keys: String,
        /// The version, which tells entries of one key apart.
        pub version: String,
    }

    /// An entry that was found.
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct FindResponse {
        /// Its key.
        pub cache_key: String,
        /// The scope that it is of.
        #[serde(default)]
        pub scope: String,
        /// The URL of its content.
        pub archive_location: String,
    }

    /// Which key to reserve, `POST PATH/caches`.
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct ReserveRequest {
        /// The key.
        pub key: String,
        /// The version.
        pub version: String,
        /// The content's size in bytes, if it is known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub cache_size: Option<u64>,
    }

    /// An upload that was granted.
    #[derive(Debug, Serialize, Deserialize)]
    #[serde(rename_all = "camelCase")]
    pub struct ReserveResponse {
        /// Its number, as in `PATCH PATH/caches/NUMBER`.
        pub cache_id: u64,
    }

    /// Makes an upload an entry, `POST PATH/caches/NUMBER`.
    #[derive(Debug, Serialize, Deserialize)]
    pub struct CommitRequest {
        /// The content's size in bytes.
        pub size: u64,
    }
}
