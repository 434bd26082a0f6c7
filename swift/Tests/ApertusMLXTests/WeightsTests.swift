import ApertusCore
import Foundation
import MLX
import Testing

@testable import ApertusMLX

@Suite(.serialized) struct WeightsTests {
    /// The error of loading a changed folder, which must be of kind `rejected`.
    private func refusal(
        _ name: String, _ change: (FolderCopy) throws -> Void
    ) throws -> String {
        let copy = try FolderCopy(ModelFixture(name: name))
        try change(copy)
        let error = #expect(throws: ApertusError.self) { _ = try ApertusModel(folder: copy.url) }
        #expect(error?.kind == .rejected)
        return error?.description ?? ""
    }

    @Test func tensorsThatDoNotFitAreNamed() throws {
        let q = "model.layers.1.self_attn.q_proj"
        for name in ["\(q).weight", "\(q).scales", "\(q).biases", "model.norm.weight"] {
            let said = try refusal("affine-3-64") { try $0.changeTensors { $0[name] = nil } }
            #expect(said.contains(name) && said.contains("missing"), "\(said)")
        }
        let left = try refusal("affine-3-64") {
            try $0.changeTensors { $0["model.layers.2.extra"] = MLXArray([Float(1)]) }
        }
        #expect(left.contains("unexpected tensor model.layers.2.extra"), "\(left)")
        let shape = try refusal("affine-3-64") {
            try $0.changeTensors { $0["\(q).scales"] = MLXArray.zeros([128, 3], dtype: .bfloat16) }
        }
        #expect(shape.contains("\(q).scales") && shape.contains("[128, 3]"), "\(shape)")
        let type = try refusal("affine-3-64") {
            try $0.changeTensors { $0["\(q).weight"] = $0["\(q).weight"]!.asType(.int32) }
        }
        #expect(type.contains("\(q).weight") && type.contains("I32"), "\(type)")
        let norm = try refusal("bf16") {
            try $0.changeTensors {
                $0["model.norm.weight"] = $0["model.norm.weight"]!.asType(.int32)
            }
        }
        #expect(norm.contains("model.norm.weight") && norm.contains("I32"), "\(norm)")
    }

    @Test func numbersThatAreNoneAreNamed() throws {
        for value in [Float.nan, .infinity] {
            let said = try refusal("bf16") {
                try $0.changeTensors {
                    $0["model.layers.0.mlp.up_proj.weight"]![3, 5] = MLXArray(value)
                        .asType(.bfloat16)
                }
            }
            #expect(said.contains("model.layers.0.mlp.up_proj.weight: holds values"), "\(said)")
        }
    }

    @Test func aTiedHeadThatDiffersIsRefused() throws {
        let said = try refusal("tied-head-stored") {
            try $0.changeTensors { $0["lm_head.weight"]![3, 5] = MLXArray(Float(9)) }
        }
        #expect(said.contains("lm_head.weight differs from the embedding"), "\(said)")
    }

    @Test func aFileThatEndsTooSoonIsRefused() throws {
        let said = try refusal("bf16") { copy in
            let file = copy.url.appendingPathComponent("model.safetensors")
            let data = try Data(contentsOf: file)
            try data.dropLast(100).write(to: file)
        }
        #expect(said.contains("truncated"), "\(said)")
    }

    @Test func bitsThatTheConfigDoesNotSayAreRefused() throws {
        let said = try refusal("affine-3-64") { try $0.changeConfig("\"bits\": 3", "\"bits\": 4") }
        #expect(said.contains("model.embed_tokens.weight: shape"), "\(said)")
    }

    @Test func progressEndsWithAllBytes() throws {
        var told: [(Int, Int)] = []
        _ = try ApertusModel(
            folder: ModelFixture(name: "float32-sharded").folder, onBytes: { told.append(($0, $1)) })
        #expect(told.last.map { $0.0 == $0.1 } == true)
        #expect(zip(told, told.dropFirst()).allSatisfy { $0.0 < $1.0 && $0.1 == $1.1 })
    }

    /// 50 loads leave nothing behind.
    @Test func memoryComesBack() throws {
        let fixture = ModelFixture(name: "affine-4-64")
        func load() throws {
            let prefix = try CachedPrefix(model: try ApertusModel(folder: fixture.folder))
            _ = try drain(try prefix.begin([5, 6, 7], maxTokens: 2))
        }
        try load()
        Memory.clearCache()
        let before = Memory.activeMemory
        for _ in 0 ..< 50 { try load() }
        // Other suites allocate at the same time, but less than 50 models.
        #expect(Memory.activeMemory - before < 8_000_000)
    }
}
