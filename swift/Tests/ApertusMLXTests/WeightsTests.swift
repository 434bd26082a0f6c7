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
        let folder = ModelFixture(name: "float32-sharded").folder
        _ = try ApertusModel(folder: folder, onBytes: { told.append(($0, $1)) })
        #expect(told.last.map { $0.0 == $0.1 } == true)
        #expect(zip(told, told.dropFirst()).allSatisfy { $0.0 < $1.0 && $0.1 == $1.1 })
    }

    /// Bytes changed, added or taken away anywhere: the model loads, or an error says why not.
    @Test(arguments: ["affine-4-64", "mxfp4", "float32-sharded"])
    func damagedFilesLoadOrSayWhatIsWrong(name: String) throws {
        let copy = try FolderCopy(ModelFixture(name: name))
        var state: UInt64 = 88_172_645_463_325_252
        func random(_ limit: Int) -> Int {
            state ^= state << 13
            state ^= state >> 7
            state ^= state << 17
            return Int(state % UInt64(limit))
        }
        let files = try FileManager.default.contentsOfDirectory(atPath: copy.url.path)
            .filter { $0.hasPrefix("model") || $0 == "config.json" }.sorted()
        var outcomes = ["loads": 0, "refused": 0]
        for round in 0 ..< 60 {
            let file = copy.url.appendingPathComponent(files[round % files.count])
            let whole = try Data(contentsOf: file)
            var data = whole
            // Half of all changes fall into the header, which is at the beginning.
            let place = random(round % 2 == 0 ? min(4000, data.count) : data.count)
            switch round % 5 {
            case 0: data.removeLast(data.count - place)
            case 1: data.insert(UInt8(random(256)), at: place)
            case 2: data.remove(at: place)
            default: data[place] = UInt8(random(256))
            }
            try data.write(to: file)
            defer { try? whole.write(to: file) }
            do {
                let prefix = try CachedPrefix(model: try ApertusModel(folder: copy.url))
                _ = try drain(try prefix.begin([5, 6], maxTokens: 2))
                outcomes["loads"]! += 1
            } catch let error as ApertusError {
                #expect(error.kind == .rejected, "\(error)")
                outcomes["refused"]! += 1
            }
        }
        #expect(outcomes.values.allSatisfy { $0 > 5 }, "\(outcomes)")
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
