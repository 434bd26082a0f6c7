import CMLXShim
import Foundation

public enum LoadSaveError: Error { case message(String) }

public func loadArrays(url: URL) throws -> [String: MLXArray] {
    try loadArraysAndMetadata(url: url).0
}
public func loadArraysAndMetadata(url: URL) throws -> ([String: MLXArray], [String: String]) {
    guard let map = mx_load_safetensors(url.path) else {
        throw LoadSaveError.message(String(cString: mx_error()))
    }
    defer { mx_map_free(map) }
    var arrays: [String: MLXArray] = [:]
    for index in 0 ..< mx_map_count(map) {
        let name = mx_map_name(map, index)!
        arrays[String(cString: name)] = MLXArray(mx_map_get(map, name))
    }
    var metadata: [String: String] = [:]
    for index in 0 ..< mx_map_metadata_count(map) {
        metadata[String(cString: mx_map_metadata_key(map, index))] =
            String(cString: mx_map_metadata_value(map, index))
    }
    return (arrays, metadata)
}
public func save(arrays: [String: MLXArray], metadata: [String: String] = [:], url: URL) throws {
    func withTexts(
        _ texts: [String], _ body: ([UnsafePointer<CChar>?]) -> Int32
    ) -> Int32 {
        let copies = texts.map { strdup($0)! }
        defer { copies.forEach { free($0) } }
        return body(copies.map { UnsafePointer($0) })
    }
    let (names, keys) = (Array(arrays.keys), Array(metadata.keys))
    let failed = withTexts(names) { names_ in
        withTexts(keys) { keys_ in
            withTexts(keys.map { metadata[$0]! }) { values_ in
                mx_save_safetensors(
                    url.path, names_, names.map { arrays[$0]!.raw as mx_array? },
                    Int32(names.count), keys_, values_, Int32(keys.count))
            }
        }
    }
    if failed != 0 { throw LoadSaveError.message(String(cString: mx_error())) }
}
