import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

/// What Python has computed on this machine: `python -m tests.swift_fixtures OUT`.
struct ModelFixture: Sendable, CustomTestStringConvertible {
    let name: String

    static let root: URL = {
        let path = ProcessInfo.processInfo.environment["APERTUS_FIXTURES"] ?? ""
        return URL(fileURLWithPath: path, isDirectory: true).appendingPathComponent("models")
    }()

    /// All of them, by name; none, and then a test that fails, where the folder is not there.
    static let all: [ModelFixture] = {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: root.path)) ?? []
        return names.filter { !$0.hasSuffix(".expected") && !$0.hasPrefix(".") }.sorted()
            .map(ModelFixture.init)
    }()

    /// Those with results in all forms of cache.
    static let withForms = ["affine-4-64", "llama3-head-dim"].prefix(sized(2, 1)).map(ModelFixture.init)

    var folder: URL { Self.root.appendingPathComponent(name) }
    var testDescription: String { name }

    func expected() throws -> [String: MLXArray] {
        try loadArrays(url: beside.appendingPathComponent("expected.safetensors"))
    }
    func ids(_ arrays: [String: MLXArray]) -> [Int] { ints(arrays["ids"]!) }

    /// Cases of a kind (`sampled`, `forms`) by name, with their options.
    func cases(_ kind: String) throws -> [(name: String, options: JSON)] {
        let data = try Data(contentsOf: beside.appendingPathComponent("cases.json"))
        return (try JSON([UInt8](data))[kind]?.members ?? []).map {
            (String(decoding: $0.key, as: UTF8.self), $0.value)
        }
    }

    var beside: URL { Self.root.appendingPathComponent("\(name).expected") }
}

func ints(_ array: MLXArray) -> [Int] { array.asArray(Int32.self).map(Int.init) }

/// Numbers of any floating-point type as bits of float32, which holds all of them.
func bits(_ array: MLXArray) -> [UInt32] {
    array.asType(.float32).asArray(Float.self).map(\.bitPattern)
}

/// All tokens of a run.
func drain(_ run: TokenRun) throws -> [Int] {
    var tokens: [Int] = []
    while let token = try run.nextToken() { tokens.append(token) }
    return tokens
}

/// A copy of a fixture in which a test may change something; removed at the end.
final class FolderCopy {
    let url: URL

    init(_ fixture: ModelFixture) throws {
        url = FileManager.default.temporaryDirectory
            .appendingPathComponent("Apertus ü \(UUID().uuidString)")
        try FileManager.default.copyItem(at: fixture.folder, to: url)
    }
    deinit { try? FileManager.default.removeItem(at: url) }

    /// Write the tensors anew, changed.
    func changeTensors(_ change: (inout [String: MLXArray]) -> Void) throws {
        let file = url.appendingPathComponent("model.safetensors")
        var arrays = try loadArrays(url: file)
        change(&arrays)
        eval(Array(arrays.values))
        try save(arrays: arrays, metadata: ["format": "pt"], url: file)
    }
    func changeConfig(_ old: String, _ new: String) throws {
        let file = url.appendingPathComponent("config.json")
        let text = try String(contentsOf: file, encoding: .utf8)
        #expect(text.contains(old))
        try text.replacingOccurrences(of: old, with: new)
            .write(to: file, atomically: true, encoding: .utf8)
    }
}

/// How much is compared: the first number where `APERTUS_NIGHTLY` is set, as for the fixtures, else the
/// second.
func sized(_ nightly: Int, _ daily: Int) -> Int {
    ProcessInfo.processInfo.environment["APERTUS_NIGHTLY"]?.isEmpty == false ? nightly : daily
}
